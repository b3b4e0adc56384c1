"""Experiments from a config: ordered variants of a model, measured, and claims about them."""
