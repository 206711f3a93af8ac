"""From a name to a model that runs with hooks at its sites."""
