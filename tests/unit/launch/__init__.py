"""Pure tests of agentcluster.launch."""
