"""Pure tests of agentcluster.client."""
