"""A model whose blocks do not fit the device: they come to it one after the other, from system memory or from disk."""
