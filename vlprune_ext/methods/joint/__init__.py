"""Methods that prune parameters and tokens jointly."""
