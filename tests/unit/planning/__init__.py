"""Pure tests of agentcluster.scheduler.planning."""
