"""Two models over the same trees."""
