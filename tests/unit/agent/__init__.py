"""Pure tests of agentcluster.agent."""
