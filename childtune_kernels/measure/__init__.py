"""Measuring: time, bandwidth, the optimizers that ours is compared with, and the gate that a number must pass."""
