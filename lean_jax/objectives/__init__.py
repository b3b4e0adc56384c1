"""Losses that need no teacher."""
