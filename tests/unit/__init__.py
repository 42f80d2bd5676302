"""Pure tests: no process, no cluster, no server."""
