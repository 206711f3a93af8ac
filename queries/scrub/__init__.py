"""Brinkmann et al.'s scrubbing of the root token's attention, with controls."""
