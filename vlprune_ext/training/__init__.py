"""Training a model while it is pruned, and after, with transformers' Trainer."""
