"""Client process: the cluster object that users hold, its panel and its display."""
