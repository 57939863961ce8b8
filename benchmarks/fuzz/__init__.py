"""Differential fuzzing: random modules from recipes, a step under a budget against eager's, bit for bit."""
