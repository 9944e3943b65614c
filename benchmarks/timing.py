"""Times: providers interleaved within each round, rounds over rotating inputs, medians over rounds.

On a GPU a provider's forward calls are one CUDA graph and its backward calls another, captured on the
autograd graphs that the first left: so backward is timed by itself, without a difference of two times,
and without ``retain_graph``, which compiled layers refuse and which would keep memory alive that
training frees. A round replays forward then backward of each provider between CUDA events. Both graphs
run through all copies of the inputs, so that a backward call finds its inputs out of the cache, as in
training. On a CPU the same rounds run eagerly under ``perf_counter``. Whole training steps run eagerly on
a GPU too, each begun on an idle device: host time is a part of their price.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Layer

__all__ = [
    "Call",
    "Eager",
    "Graphs",
    "Step",
    "Timing",
    "TrainingCall",
    "calls_needed",
    "copies_needed",
    "interleave",
    "synchronize",
    "time_call",
]

_GRAPH_SECONDS = 1.5e-3  # a graph shorter than this would be timed together with its launch
_MAX_CALLS = 48
_MIN_ROUNDS, _MAX_ROUNDS = 8, 200


@dataclass(frozen=True, eq=False)
class Call:
    """One layer on one copy of the inputs; ``dy`` None means forward only, without autograd."""

    layer: Layer
    dy: Tensor | None

    def forward(self) -> Tensor:
        if self.dy is None:
            with torch.no_grad():
                return self.layer.forward()
        return self.layer.forward()

    def backward(self, y: Tensor) -> None:
        if self.dy is not None:
            torch.autograd.grad(y, list(self.layer.leaves.values()), Layer.gradients(y, self.dy))


class TrainingCall(Call):
    """The same with gradients put where an optimiser finds them."""

    def backward(self, y: Tensor) -> None:
        y.backward(self.dy)

    def drop_gradients(self) -> None:
        """Forget the gradients, so that the next step does not add to them."""
        for leaf in self.layer.leaves.values():
            leaf.grad = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call in each round, in the order of the rounds."""

    rounds: list[float]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile, ms."""
        low, middle, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, middle, high

    def ratio(self, floor: "Timing") -> float:
        """Median over rounds of this time over the floor's time in the same round, dimensionless."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, floor.rounds, strict=True))

    def columns(self, floor: "Timing | None") -> dict[str, float | None]:
        """Return what a row tells of it: median and quartiles, ms, and the ratio to the floor, if any."""
        low, median, high = self.quartiles
        return {"ms": median, "q1": low, "q3": high, "ratio": self.ratio(floor) if floor else None}


def synchronize(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def copies_needed(set_bytes: float, l2_bytes: float) -> int:
    """Return how many sets of inputs to rotate so that together they are over three times the L2 cache."""
    return max(2, min(_MAX_CALLS, math.ceil(3 * l2_bytes / max(set_bytes, 1))))


def calls_needed(copies: int, call_seconds: float) -> int:
    """Return the calls in one graph: a multiple of ``copies`` that takes long enough to hide its launch."""
    wanted = min(_MAX_CALLS, math.ceil(_GRAPH_SECONDS / max(call_seconds, 1e-9)))
    return copies * math.ceil(max(wanted, 1) / copies)


@contextmanager
def _no_collection() -> Iterator[None]:
    # a graph or an event that the collector destroys during a capture would invalidate the capture
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Eager:
    """Forward and backward calls, run as they come; for devices without graphs."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = calls
        for call in calls:
            call.backward(call.forward())

    def run(self, stamp: Callable[[], object]) -> list[object]:
        """Run all calls and return stamps from before, between and after the two passes."""
        stamps = [stamp()]
        ys = [call.forward() for call in self.calls]
        stamps.append(stamp())
        for call, y in zip(self.calls, ys, strict=True):
            call.backward(y)
        return [*stamps, stamp()]


class Step(Eager):
    """One training step as a user runs it: eager, begun on an idle device, so that host time counts.

    Gradients are dropped between steps and outside the time. ``host_ms`` holds the host time of each step
    until its last launch.
    """

    def __init__(self, call: TrainingCall, device: str):
        self.device, self.host_ms = device, []
        super().__init__([call])
        call.drop_gradients()

    def run(self, stamp: Callable[[], object]) -> list[object]:
        """Run one step and return stamps from before, between and after the two passes."""
        synchronize(self.device)
        begin = time.perf_counter()
        stamps = super().run(stamp)
        self.host_ms.append(1e3 * (time.perf_counter() - begin))
        self.calls[0].drop_gradients()
        return stamps


class Graphs:
    """The same as two CUDA graphs; must be built on the side stream that all warm-up ran on.

    Args:
        calls: one after another in the graph; they may repeat.
        pool: memory pool of the graphs. Providers may share one: nothing is read after its own replay.
    """

    def __init__(self, calls: Sequence[Call], pool: object):
        self.calls = calls  # the graphs hold addresses only: this keeps the inputs alive
        stream = torch.cuda.current_stream()
        for call in dict.fromkeys(calls):
            call.backward(call.forward())
        torch.cuda.synchronize()
        self.forward, self.backward = torch.cuda.CUDAGraph(), None
        with _no_collection():
            with torch.cuda.graph(self.forward, pool=pool, stream=stream):
                ys = [call.forward() for call in calls]
            if calls[0].dy is not None:
                self.backward = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.backward, pool=pool, stream=stream):
                    # popping frees what forward kept, as training does; the next replay writes it anew
                    ys.reverse()
                    for call in calls:
                        call.backward(ys.pop())

    def run(self, stamp: Callable[[], object]) -> list[object]:
        """Replay both graphs and return stamps from before, between and after."""
        stamps = [stamp()]
        self.forward.replay()
        stamps.append(stamp())
        if self.backward is not None:
            self.backward.replay()
        return [*stamps, stamp()]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(device: str, start: object, end: object) -> float:
    return start.elapsed_time(end) if device == "cuda" else 1e3 * (end - start)


def interleave(
    runs: Mapping[str, Eager | Graphs], device: str, seconds: float
) -> dict[str, dict[str, Timing]]:
    """Time all providers in the same rounds for about ``seconds``, a fifth of it warm-up.

    Returns:
        By provider: "fwd", and where there is a backward pass "bwd" and "both". "both" runs from the
        start of forward to the end of backward.
    """
    order = list(runs)
    stamp = _event if device == "cuda" else time.perf_counter
    begin = time.perf_counter()
    warm_rounds = 0
    while warm_rounds < 2 or time.perf_counter() - begin < 0.2 * seconds:
        for name in order:
            runs[name].run(stamp)
        synchronize(device)
        warm_rounds += 1
    round_seconds = (time.perf_counter() - begin) / warm_rounds
    count = int(0.8 * seconds / max(round_seconds, 1e-9))
    stamps: list[dict[str, list[object]]] = []
    for index in range(max(_MIN_ROUNDS, min(_MAX_ROUNDS, count))):
        first = index % len(order)  # nobody always runs after the same neighbour's start
        stamps.append({name: runs[name].run(stamp) for name in order[first:] + order[:first]})
    synchronize(device)
    return {name: _timings(runs[name], [marks[name] for marks in stamps], device) for name in order}


def _timings(run: Eager | Graphs, marks: list[list[object]], device: str) -> dict[str, Timing]:
    spans = {"fwd": (0, 1)} if run.calls[0].dy is None else {"fwd": (0, 1), "bwd": (1, 2), "both": (0, 2)}
    calls = len(run.calls)
    return {
        key: Timing([_milliseconds(device, m[start], m[end]) / calls for m in marks])
        for key, (start, end) in spans.items()
    }


def time_call(function: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the median seconds of one eager call, after three that are not counted."""
    stamp = _event if device == "cuda" else time.perf_counter
    for _ in range(3):
        function()
    pairs = []
    for _ in range(repeats):
        start = stamp()
        function()
        pairs.append((start, stamp()))
    synchronize(device)
    return statistics.median(_milliseconds(device, start, end) for start, end in pairs) / 1e3
