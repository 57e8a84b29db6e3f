"""`tensorkv bench`: what a step costs here, against what it costs when only the bytes move."""
