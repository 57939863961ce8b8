"""Real architectures of the `models` extra: built from tiny configurations, nothing downloaded."""
