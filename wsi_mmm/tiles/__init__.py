"""The tiles of a slide: grid arithmetic, tissue, and reading them in streams."""
