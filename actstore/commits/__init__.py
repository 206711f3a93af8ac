"""What was committed: the store's format, its manifests, and the log that they make."""
