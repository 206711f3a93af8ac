"""Where bytes are: a folder whose files are published once, replaced whole, and leased to one writer."""
