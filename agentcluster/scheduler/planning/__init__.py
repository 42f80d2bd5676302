"""Pure planning: no await, no clock, no dask objects."""
