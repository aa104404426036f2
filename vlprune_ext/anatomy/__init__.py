"""Locations of a model's towers, blocks, heads, neurons and projections: one small entry per model family.

A *tower* is a stack of residual blocks. A *site* is an output projection whose input splits into removable units: the
heads of an attention, the neurons of an MLP. Nothing here runs a model or changes one.
"""

from .blocks import LAYOUTS, Block, Layout, Site, SitePaths, bind_block
from .families import FAMILIES, Family, VisualPaths, register
from .model import Anatomy, describe
from .towers import IGNORED, Tower, TowerPaths

KINDS = ("head", "cross_head", "neurons", "layer")  # of structured pruning
MATRIX = "matrix"  # the kind of unstructured and n:m pruning

__all__ = [
    "FAMILIES",
    "IGNORED",
    "KINDS",
    "LAYOUTS",
    "MATRIX",
    "Anatomy",
    "Block",
    "Family",
    "Layout",
    "Site",
    "SitePaths",
    "Tower",
    "TowerPaths",
    "VisualPaths",
    "bind_block",
    "describe",
    "register",
]
