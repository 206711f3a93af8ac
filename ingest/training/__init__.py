"""Train a model, evaluate it, and write its card."""
