"""Where bytes are: a folder or a bucket; files published once or replaced, one writer at a time."""
