"""Each row of x times the matrix of its group."""
