"""What travels: typed messages and the frames that carry them. No socket and no thread."""
