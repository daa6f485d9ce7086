"""What training and serving must agree on: which base models there are, their weights, their prompts."""
