"""Time a call: cold caches, settled clocks, launches by Python left out.

On a GPU, a side of a comparison is captured as a CUDA graph that calls it once on each of several input sets, and the
graph is replayed between two events. What the calls return is kept until the capture ends, so that each writes to
memory of its own, as it would outside a graph. Before each replay a buffer larger than the last-level cache is *read*:
writing it would leave dirty lines, whose write-back the timed kernel would pay for. While the GPU reads it, the host
launches the graph, so that no launch is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[..., object]
Inputs = tuple[Any, ...]

GRAPH_SECONDS = 2e-3  # a graph this long makes the launch of a graph (a few us) and the events' resolution small
SETS = 16  # input sets at most
SETS_BYTES = 2 << 30  # and the memory that they may take


def bytes_of(*values: object) -> int:
    """Count the bytes of all tensors in ``values``, also within tuples and lists."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (tuple, list)):
            total += bytes_of(*value)
    return total


class Run:
    """One side: :meth:`ready` brings its inputs into their state, untimed; :meth:`once` returns seconds of a call."""

    notes = ""
    seconds = 0.0  # of one call, roughly

    def ready(self) -> None:
        raise NotImplementedError

    def once(self) -> float:
        raise NotImplementedError


class CpuTimer:
    """Times calls on the CPU, with its caches emptied by reading 64 MB (the last-level caches in use have 36)."""

    settled = True

    def __init__(self) -> None:
        self._other = torch.ones(64 << 20, dtype=torch.uint8)

    def synchronize(self) -> None: ...

    def sets(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Make the input sets: one, since the caches are emptied before each call."""
        return [make()]

    def evict(self) -> None:
        self._other.amax()

    def run(self, call: Call, sets: Sequence[Inputs], setup: Call | None = None, *, graph: bool = True) -> Run:
        """Prepare a side; ``graph`` makes no difference here."""
        return _HostRun(self, call, sets, setup)

    def rounds(self, asked: int, seconds: float) -> int:
        return asked


class GpuTimer:
    """Times calls on an NVIDIA GPU.

    Parameters
    ----------
    cuda : module
        ``torch.cuda``, or what stands in for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        cache = getattr(cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._other = torch.ones(cache, dtype=torch.int32, device=device)  # four times its bytes
        self.settled = self._settle()

    def _settle(self, limit: float = 3.0) -> bool:
        """Multiply matrices until three batches in a row take the same time within 1%, or ``limit`` seconds."""
        a = torch.randn(4096, 4096, device=self._device).to(torch.bfloat16)
        taken: list[float] = []
        stop = time.perf_counter() + limit
        while time.perf_counter() < stop:
            taken.append(self.seconds_of(lambda: [a @ a for _ in range(20)]))
            last = taken[-3:]
            if len(last) == 3 and max(last) < 1.01 * min(last):
                return True
        return False

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def seconds_of(self, call: Callable[[], object]) -> float:
        """Return the seconds between two events around ``call()``."""
        begin, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        self._cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def sets(self, make: Callable[[], Inputs]) -> list[Inputs]:
        """Make the input sets: as many as fit, at most 16."""
        first = make()
        count = max(1, min(SETS, SETS_BYTES // max(1, bytes_of(first))))
        return [first, *(make() for _ in range(count - 1))]

    def evict(self) -> None:
        self._other.amax()

    def run(self, call: Call, sets: Sequence[Inputs], setup: Call | None = None, *, graph: bool = True) -> Run:
        """Prepare a side: captured as a graph, or, with ``graph=False``, timed by the host until the GPU is done.

        A call that cannot be captured is timed by the host, and its ``notes`` say so.
        """
        if not graph:
            return _HostRun(self, call, sets, setup)
        try:
            return _GraphRun(self, self._cuda, call, sets, setup)
        except RuntimeError as error:
            self._cuda.synchronize()
            run = _HostRun(self, call, sets, setup)
            run.notes = f"not as a graph ({str(error).splitlines()[0][:80]})"
            return run

    def rounds(self, asked: int, seconds: float) -> int:
        """Between 7 and 50, to take about a quarter of a second."""
        return max(7, min(50, int(0.25 / max(seconds, 1e-6))))


class _GraphRun(Run):
    def __init__(self, timer: GpuTimer, cuda: Any, call: Call, sets: Sequence[Inputs], setup: Call | None) -> None:
        self._timer, self._setup = timer, setup
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):  # a first call allocates and loads; not what is to be captured
            for _ in range(2):
                if setup is not None:
                    setup(*sets[0])
                seconds = timer.seconds_of(lambda: call(*sets[0]))
        cuda.current_stream().wait_stream(stream)
        self._sets = sets[: max(1, min(len(sets), int(GRAPH_SECONDS / max(seconds, 1e-7)) + 1))]
        if setup is not None:
            for inputs in self._sets:
                setup(*inputs)
        cuda.synchronize()
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            results = [call(*inputs) for inputs in self._sets]
        del results
        self.ready()
        self.seconds = self.once()

    def ready(self) -> None:
        if self._setup is not None:
            for inputs in self._sets:
                self._setup(*inputs)

    def once(self) -> float:
        self._timer.evict()
        return self._timer.seconds_of(self._graph.replay) / len(self._sets)


class _HostRun(Run):
    """Timed by the host's clock, from the call to the end of all that it started."""

    def __init__(self, timer: CpuTimer | GpuTimer, call: Call, sets: Sequence[Inputs], setup: Call | None) -> None:
        self._timer, self._call, self._setup, self._sets = timer, call, setup, sets
        self._turn = 0
        self.ready()
        self.seconds = self.once()

    def ready(self) -> None:
        self._turn = (self._turn + 1) % len(self._sets)
        if self._setup is not None:
            self._setup(*self._sets[self._turn])
        self._timer.evict()
        self._timer.synchronize()

    def once(self) -> float:
        begin = time.perf_counter()
        self._call(*self._sets[self._turn])
        self._timer.synchronize()
        return time.perf_counter() - begin


class Ceilings:
    """What the machine can do at the size of a row: a copy and a matrix product, measured in the same run."""

    def __init__(self, timer: CpuTimer | GpuTimer, device: torch.device) -> None:
        self._timer, self._device = timer, device
        self._largest = 8192 if device.type == "cuda" else 1024  # of a product, which is the same at any size beyond
        self._known: dict[tuple[object, ...], float] = {}

    def _best(self, key: tuple[object, ...], call: Call, make: Callable[[], Inputs]) -> float:
        if key not in self._known:
            run = self._timer.run(call, self._timer.sets(make))
            taken = []
            for _ in range(self._timer.rounds(5, run.seconds)):
                run.ready()
                taken.append(run.once())
            self._known[key] = sorted(taken)[len(taken) // 2]
        return self._known[key]

    def copy_seconds(self, moved: float) -> float:
        """Seconds of a copy that reads and writes ``moved`` bytes in all."""
        size = max(1, int(moved) // 2)

        def make() -> Inputs:
            source = torch.ones(size, dtype=torch.uint8, device=self._device)
            return torch.empty_like(source), source

        return self._best(("copy", size), lambda into, source: into.copy_(source), make)

    def product_seconds(self, flops: float, dtype: torch.dtype) -> float:
        """Seconds that square matrices take for ``flops``, at the rate of the largest that is tried."""
        # Torch has no fast product of 16-bit matrices where the CPU has no instructions for them.
        largest = 128 if self._device.type == "cpu" and dtype != torch.float32 else self._largest
        n = max(64, min(largest, round((flops / 2) ** (1 / 3) / 64) * 64))

        def make() -> Inputs:
            return tuple(torch.randn(n, n, device=self._device).to(dtype) for _ in range(2))

        return self._best(("product", n, dtype), torch.matmul, make) * flops / (2 * n**3)


def timer_of(device: torch.device) -> CpuTimer | GpuTimer:
    """Return the timer for ``device``."""
    return GpuTimer(device) if device.type == "cuda" else CpuTimer()
