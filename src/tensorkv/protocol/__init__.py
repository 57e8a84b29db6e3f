"""Pure state machines: no socket, thread, clock or file. Messages come in, and messages go out."""
