"""Rows and files: the database is the truth, processes are cattle."""
