"""Experiments: tasks, training, and comparisons of methods over seeds."""
