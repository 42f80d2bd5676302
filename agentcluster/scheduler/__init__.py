"""Scheduler process: registry of nodes, rollouts, evacuation, autoscaling."""
