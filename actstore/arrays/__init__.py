"""The numbers of one site: their address, their layout on the disk, how they are packed and read."""
