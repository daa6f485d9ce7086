"""Examples in, adapter out: torch only, no database, no HTTP."""
