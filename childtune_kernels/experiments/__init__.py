"""Experiments: tasks, training, and fair comparisons of methods."""
