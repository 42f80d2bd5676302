"""Tests of agentcluster, in folders that mirror the package."""
