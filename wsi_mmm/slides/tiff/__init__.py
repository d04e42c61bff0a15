"""The direct TIFF reader."""
