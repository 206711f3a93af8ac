"""`actstore open`: a store in the browser. Panels are functions from a store to pictures."""
