"""Command lines: ``dask-agent``, ``agentcluster``, and the process that launchers start."""
