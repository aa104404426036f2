"""Methods that zero single weights: unstructured and n:m pruning."""
