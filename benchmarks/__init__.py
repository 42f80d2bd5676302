"""What agentcluster is measured with; run from the repository's root, not installed."""
