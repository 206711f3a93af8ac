"""A stored run made again, and compared with what is stored."""
