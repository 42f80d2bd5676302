"""The command lines: ``dask-agent``, ``agentcluster``, and what launchers start."""
