"""Named queries, and the studies made of them."""
