"""Where work units run: this process, or Dask workers."""
