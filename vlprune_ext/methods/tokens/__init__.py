"""Methods that prune visual tokens while a model runs."""
