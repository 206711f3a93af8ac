"""Where the heads of a model attend."""
