"""``-p emulator.plugin``: what tests launch on the CPU is run by the emulator instead.

Each launch may access the tensors whose addresses it was given, from the first to the last element, and nothing else.
"""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

EMULATED = pytest.StashKey[types.ModuleType]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated", metavar="FOLDER", default="build/emulator", help="where the emulator was built")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--emulated")
    found = sorted(Path(folder).glob("_emulated*.so"))
    if len(found) != 1:
        raise pytest.UsageError(f"--emulated {folder}: {len(found)} modules named _emulated are there; expected one")
    spec = importlib.util.spec_from_file_location("_emulated", found[0])
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    config.stash[EMULATED] = emulated
    _put_in_place(emulated)


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> types.ModuleType:
    return pytestconfig.stash[EMULATED]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is about the CPU (instruction sets, numbers of threads, the build), and what needs 16 GB."""
    kept, left_out = [], []
    for item in items:
        parameters = item.callspec.params.keys() if hasattr(item, "callspec") else set()
        of_the_cpu = parameters & {"isa", "threads"} and "device" not in parameters
        is_left_out = of_the_cpu or item.path.name == "test_native.py" or item.get_closest_marker("large")
        (left_out if is_left_out else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _put_in_place(emulated: types.ModuleType) -> None:
    from vlprune_ext import _native

    data_ptr = torch.Tensor.data_ptr

    def allowed_data_ptr(tensor: torch.Tensor) -> int:
        address = data_ptr(tensor)
        if tensor.numel() > 0:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            emulated.allow(address, (last + 1) * tensor.element_size())
        return address

    def launch(name: str, _device: torch.device, *args: object) -> None:
        try:
            getattr(emulated, name)(*args, 0)  # the stream
        finally:
            emulated.forbid_all()

    torch.Tensor.data_ptr = allowed_data_ptr
    _native.is_cuda = lambda _device: True
    _native._launch = launch
