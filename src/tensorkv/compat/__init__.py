"""The APIs of older systems on top of a TensorKV store."""
