"""Adapter and prompt in, text out."""
