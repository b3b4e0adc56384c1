"""Rounding in training: the value is rounded; the gradient passes straight, or learns the step."""
