"""The model's answers, graded: paths of trees, and free continuations."""
