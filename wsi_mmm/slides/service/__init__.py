"""Readers of slides behind an HTTP service: the EMPAIA WSI service and App API."""
