"""The blocks of models.

Dimension letters, the same everywhere, lower case in equations: B batch, T queries, S keys,
D model, H heads, G groups (key and value heads), K head, F hidden, E experts, R rank, N layers,
V vocabulary, P prefix.
"""
