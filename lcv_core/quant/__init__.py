"""Weights in fewer bits: formats as pure functions, and a linear layer that holds them."""
