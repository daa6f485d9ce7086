"""Tunesmith."""
