"""``python -m vlprune_ext``: the same as ``vlprune``."""

from .cli.app import main

if __name__ == "__main__":
    main()
