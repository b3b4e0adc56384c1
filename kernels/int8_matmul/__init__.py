"""y = x @ (values * scale), both sides of the product in 8 bits."""
