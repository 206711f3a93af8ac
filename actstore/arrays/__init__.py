"""One site's numbers: their address, their layout on the disk, packing and reading."""
