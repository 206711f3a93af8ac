"""Where bytes are: a folder with files published once or replaced whole, leased to one writer."""
