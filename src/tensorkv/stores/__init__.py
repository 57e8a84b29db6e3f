"""The kinds of store. `registry` knows them by name."""
