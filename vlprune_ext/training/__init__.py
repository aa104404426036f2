"""Training a model while it is pruned, and after: transformers' Trainer."""
