"""The subcommands of ``vlprune``, one module each."""
