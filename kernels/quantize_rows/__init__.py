"""Rows of numbers as 8-bit integers and a step each, in one pass."""
