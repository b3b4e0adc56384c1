"""One query a row over keys and values in codes of few bits."""
