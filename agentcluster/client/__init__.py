"""Client process: the cluster object that users hold, its members, and its panel in notebooks."""
