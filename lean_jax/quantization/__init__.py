"""Quantization: formats, and methods that bring a weight into them."""
