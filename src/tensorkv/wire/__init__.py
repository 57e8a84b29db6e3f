"""The wire protocol: typed messages and the frames that carry them. No socket and no thread."""
