"""What is done to a slide: prepare, forward, interpret, publish."""
