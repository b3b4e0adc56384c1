"""One file a family: its config and its checkpoint's names."""
