"""One snapshot of a store, and all that is read from it."""
