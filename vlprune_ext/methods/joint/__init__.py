"""Methods that prune parameters and tokens together."""
