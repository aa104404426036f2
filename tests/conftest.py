"""Fixtures of every test: the device, the dtype, and what makes a run repeatable."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch
from sampling import evenly

LARGE_BYTES = 16 << 30
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each test that takes it runs on the CPU and, marked ``gpu``, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def untrained_clip(tmp_path_factory) -> Path:
    """A CLIP of two and two layers, two heads and 64 neurons each, with the processor of clip-digits."""
    import transformers  # slow to import

    from vlprune_ext import zoo

    folder = tmp_path_factory.mktemp("models") / "tiny"
    processor = transformers.AutoProcessor.from_pretrained(zoo.path("clip-digits"))
    tokenizer = processor.tokenizer
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        vision_config={**size, "image_size": 48, "patch_size": 16},
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def charts(monkeypatch) -> dict:
    """The charts that pages show, by title; the pages hold their titles in their place, which takes less time."""
    from vlprune_ext.report import pruning, stages  # matplotlib is slow to import

    drawn = {}

    def title(figure) -> str:
        drawn[figure.get_suptitle()] = figure
        return f"<svg>{figure.get_suptitle()}</svg>"

    for page in (pruning, stages):
        monkeypatch.setattr(page, "svg", title)
    return drawn


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest):
    torch.default_generator.manual_seed(0)  # torch.manual_seed also notes, for each kind of device, who asked
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny sizes gain nothing from threads; tests that are about them set their number
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _room_for_large(request: pytest.FixtureRequest):
    if request.node.get_closest_marker("large") is None:
        return
    if request.getfixturevalue("device").type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError, StopIteration):  # Linux counts what it can reclaim, too
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    if free < LARGE_BYTES:
        pytest.skip(f"needs {LARGE_BYTES >> 30} GB of free memory, there are {free >> 30}")


def _gpu_missing() -> str | None:
    if not torch.cuda.is_available():
        return "they need an NVIDIA GPU that torch can use"
    from vlprune_ext import _native

    if not _native.build_info()["cuda_built"]:
        return "they need a build of vlprune_ext with CUDA"
    return None


def pytest_report_header() -> str | None:
    reason = _gpu_missing()
    return reason and f"without the tests marked gpu: {reason}"


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection has to look at it again. Each training run asks for several."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="run N of the chosen tests, as many of each file")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):  # one at a time
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(pytest.mark.xdist_group("large"))
    if _gpu_missing():
        marked = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if (count := config.getoption("--sample")) is not None:
        kept = {items[i] for i in evenly([item.path for item in items], count)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
