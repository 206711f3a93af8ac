"""A forward pass with edited activations: from a query's rows to answers."""
