"""What the API means: one class per official service, one method per RPC; no transport, no torch."""
