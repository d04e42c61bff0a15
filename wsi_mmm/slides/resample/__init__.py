"""From native tiles to target pixels: which ones are needed, and how they are averaged."""
