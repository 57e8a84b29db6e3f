"""`tensorkv bench`: the cost of a step here, against the cost of only moving the bytes."""
