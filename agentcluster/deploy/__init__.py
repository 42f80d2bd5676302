"""What single cluster managers need beyond ``dask-agent`` itself."""
