"""The executors of work units: this process, or Dask workers."""
