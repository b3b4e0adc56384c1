"""BitFit: the biases train, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199)."""
BIASES = '(.*/)?bias'           # `trainable=` of training; norms' biases too, as in the paper
