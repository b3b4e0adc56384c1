"""Figures of a model: perplexity, speed, memory."""
