"""An HTML page from a template, and what stands on every page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from .._version import __version__
from ..workflow.machine import environment


def fill(template: str, **content: Any) -> str:
    """Render a page from a template and its content."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlprune_ext.report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(version=__version__, **content)


def versions() -> list[tuple[str, str]]:
    """Return the versions and the machine that a page was made with, as rows."""
    about = environment()
    shown = ("vlprune_ext", "torch", "transformers", "python", "machine", "threads", "isa", "gpus")
    return [(key.replace("_", " "), plain(about[key])) for key in shown if about[key]]


def plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
