"""The commands of ``vlprune``, a module each: plain functions, which cli.py names and gives an example.

Heavy imports happen inside the functions, so that ``--help`` answers at once.
"""
