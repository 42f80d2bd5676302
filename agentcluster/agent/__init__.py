"""Agent process: one per host, which owns the workers of that host."""
