"""What neither torch nor a library does fast enough, in C."""
