"""The journey from a tree to its activations: trees, tokens, models, activations, and the loop that stores them."""
