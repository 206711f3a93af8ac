"""Rerun a stored run, and compare the result with what is stored."""
