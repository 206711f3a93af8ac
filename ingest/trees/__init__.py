"""The task of path finding in trees: drawing them, writing them as tokens and as rows of tables."""
