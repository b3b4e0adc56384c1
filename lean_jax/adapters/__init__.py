"""Adapters: small trainable parts on a frozen model."""
