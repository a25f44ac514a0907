"""What the miniature learns from: procedural clips with captions and ground truth."""
