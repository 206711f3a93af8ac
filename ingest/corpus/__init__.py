"""The task of text: documents from files, as tokens, cut into sequences and packed into batches."""
