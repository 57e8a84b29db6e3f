"""Pure state machines: no socket, thread or clock. What comes in are messages, what goes out are messages."""
