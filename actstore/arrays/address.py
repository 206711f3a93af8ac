"""How a token's id says where its activation is."""

from __future__ import annotations

POSITIONS_PER_TREE = 256  # token_id = tree_id * 256 + position: more than the 255 positions of the largest tree
POSITION_BITS, POSITION_MASK = 8, 255
