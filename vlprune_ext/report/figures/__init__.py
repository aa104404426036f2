"""Charts, drawn by matplotlib, a module for each subject."""
