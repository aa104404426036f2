"""Methods that remove units: structured pruning of heads, neurons and layers."""
