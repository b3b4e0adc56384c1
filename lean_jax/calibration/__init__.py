"""Calibration: what a model's weights are multiplied with, and methods that look at it."""
