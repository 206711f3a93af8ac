"""Train a model, evaluate the model, and write its card."""
