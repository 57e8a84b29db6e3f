"""The command line. It does without torch, and so do the processes that only launch or schedule."""
