"""The free continuations of a model that is given a tree alone."""
