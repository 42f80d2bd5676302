"""Pure tests of agentcluster.scheduler outside its planning."""
