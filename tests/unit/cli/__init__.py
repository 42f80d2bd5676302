"""Pure tests of agentcluster.cli."""
