"""From a tree to its stored activations: trees, models, answers, and jobs that store them."""
