"""Methods that prune visual tokens at inference."""
