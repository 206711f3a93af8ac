"""From what was asked for to committed batches."""
