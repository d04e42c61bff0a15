"""The stages of a slide: prepare, forward, interpret, publish."""
