"""Who is calling: credentials to Caller."""
