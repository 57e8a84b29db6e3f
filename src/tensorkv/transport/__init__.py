"""Transports: they move frames between two processes, or two threads, and know nothing of messages."""
