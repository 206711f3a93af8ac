"""A store's activations in the forms that other tools take."""
