"""Build the API page from the docstrings: every public name of ``vlprune_ext``, by pdoc. A warning is a failure.

    python scripts/docs_api.py build/docs

Needs the compiled module, since the page is made from the imported package.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
import warnings
from pathlib import Path

import pdoc

import vlprune_ext


def resolve_constructors() -> None:
    """Resolve the annotations of dataclasses' constructors, inherited fields' in the modules of the base classes.

    pdoc looks them up in the module of the subclass alone, which need not import the names.
    """
    for name in vlprune_ext.__all__:
        found = getattr(vlprune_ext, name)  # also loads it
        if inspect.isclass(found) and dataclasses.is_dataclass(found) and "__init__" in vars(found):
            hints = typing.get_type_hints(found)
            init = found.__init__
            init.__annotations__ = {key: hints.get(key, value) for key, value in init.__annotations__.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the HTML")
    out = parser.parse_args().out
    resolve_constructors()
    pdoc.render.configure(docformat="numpy", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc("vlprune_ext", output_directory=out)
    print(out / "vlprune_ext.html")


if __name__ == "__main__":
    main()
