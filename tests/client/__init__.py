"""Tests of AgentCluster and its parts."""
