"""``vlprune info``: versions and what was compiled."""

from __future__ import annotations

from ..arguments import Debug, Json
from ..terminal import quiet, show, show_json, table


def info(json: Json = False, debug: Debug = False) -> None:
    """Versions, what was compiled, which instruction set runs, threads, GPUs."""
    quiet()
    from ...workflow.machine import environment

    content = environment()
    if json:
        show_json(content)
        return
    shown = table("", "")
    shown.columns[1].justify = "left"
    shown.columns[1].no_wrap = False
    for key, value in content.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown.add_row(f"[dim]{key.replace('_', ' ')}[/dim]", text or "none")
    shown.show_header = False
    show(shown)
