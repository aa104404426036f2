"""The emulator refuses kernels that are wrong, and runs the same kernels when they are right.

Run by ``make emulate``, for which the fixture ``emulated`` is the module that was built.
"""

import pytest
import torch

FAULTS = {
    "bounds": "writes 4 bytes .* outside all memory of the launch; near one of 256 bytes",
    "alignment": r"thread \(7, 0\) .* moves 16 bytes at once at 0x[0-9a-f]+, which is not aligned",
    "shared bounds": "writes 4 bytes .* near shared memory of 256 bytes",
    "barrier": r"(reads|writes) 4 bytes .* in a race with thread \d+ of block 0",
    "late barrier": r"(reads|writes) 4 bytes .* in a race with thread \d+ of block 0",
    "warp": r"(reads|writes) 4 bytes .* in a race with thread \d+ of block 0",
    "blocks": r"writes 4 bytes .* in a race with thread \d+ of block [01]",
    "atomic": r"(reads|writes) 4 bytes .* in a race with thread \d+ of block 0",
    "divergent": r"waits at faults.cu:\d+, others at faults.cu:\d+",
    "lanes": r"lanes .* that have returned|has returned, its warp waits",
    "scan": r"in a race with thread \d+ of block 0",
    "trap": r"thread \(3, 0\) of block \(0, 0\) trap",
    "threads": "1056 threads in a block",
    "shared memory": "65536 bytes of dynamic shared memory",
}


def run(emulated, name, faulty):
    out = torch.full((64,), -7, dtype=torch.int32)
    emulated.allow(out.data_ptr(), 256)
    try:
        emulated.faults(name, out.data_ptr(), faulty)
    finally:
        emulated.forbid_all()
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_refuses_what_is_wrong(emulated, name):
    with pytest.raises(RuntimeError, match=rf"(?s)emulator: faults.cu:\d+ kernel: .*{FAULTS[name]}"):
        run(emulated, name, faulty=True)


@pytest.mark.parametrize("name", [*FAULTS, "copy"])
def test_runs_what_is_right(emulated, name):
    assert run(emulated, name, faulty=False).tolist() == list(range(64))


def test_a_copy_that_is_not_waited_for_is_garbage(emulated):
    assert run(emulated, "copy", faulty=True).tolist() == [-1] * 64
