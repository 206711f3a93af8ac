"""What `make torture` does to stores: kills at random moments, flipped bits, readers beside a writer."""
