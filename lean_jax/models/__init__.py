"""Models assembled from the blocks."""
