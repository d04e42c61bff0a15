"""What a run shows of itself: report, timing, logs, metrics, traces."""
