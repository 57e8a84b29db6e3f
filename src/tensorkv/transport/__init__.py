"""Moves frames between two processes, or two threads, and knows no message."""
