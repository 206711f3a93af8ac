"""What a model goes on with when it is given a tree alone."""
