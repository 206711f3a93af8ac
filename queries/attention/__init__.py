"""Where the heads of a model look."""
