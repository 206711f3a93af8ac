"""What a model answers, graded: paths of trees, and continuations."""
