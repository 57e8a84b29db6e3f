"""The names of older systems over a TensorKV store."""
