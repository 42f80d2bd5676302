"""Tests with other deployment tools, with dask-cuda and with a browser."""
