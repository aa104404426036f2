"""How each model of ``vlprune_ext/zoo`` is made: one ``Recipe`` a file, and the card they share."""
