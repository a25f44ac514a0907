"""Training of every part of the model. Nothing else in `lcv_core` imports it, the command line apart."""
