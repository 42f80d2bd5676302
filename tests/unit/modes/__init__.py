"""Pure tests of agentcluster.modes."""
