"""Rounding in training: the value is rounded, the gradient passes straight through."""
