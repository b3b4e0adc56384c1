"""y = x @ w, w in codes of few bits and x as it is."""
