"""The tables of a store: declared, built from the committed parts, and noted by their hash."""
