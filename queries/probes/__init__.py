"""Linear probes: what each site says about the tree."""
