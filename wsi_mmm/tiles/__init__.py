"""Which tiles of a slide, and in what order they come: grid, tissue, stream."""
