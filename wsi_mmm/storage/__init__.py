"""Bytes at a URI: local files, S3, HTTP and fsspec; ranges, retries, atomic writes, limits."""
