"""Rows of numbers as integers of 8 or 4 bits and a step each, in one pass."""
