"""What a person types; `cli.py` is the table of all commands."""
