"""Text in, ratings out: what a text may be harmful for, and what to do about it."""
