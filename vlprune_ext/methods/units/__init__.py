"""Methods that remove units."""
