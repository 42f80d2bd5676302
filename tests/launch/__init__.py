"""Tests of launchers, hosts and adopted agents."""
