"""Define a run, commit its batches, record results."""
