"""The command ``vlprune``: arguments, terminal, one module for each command."""
