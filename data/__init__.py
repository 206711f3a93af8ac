"""Trained models and their configurations, installed with the package so that they can be named anywhere."""
