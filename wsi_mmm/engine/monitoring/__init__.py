"""Report, timing, logs, metrics and traces of a run."""
