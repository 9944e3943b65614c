"""What is measured besides time: memory, host time, launches, and the two ceilings of the machine."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .timing import Call, synchronize, time_call

__all__ = ["host_microseconds", "kept", "launches", "peak_mib", "peaks", "trace_kernels"]

# a batch is short, so that the launch queue never fills and blocks the host
_HOST_CALLS, _HOST_BATCHES, _HOST_SECONDS = 6, 7, 0.5


def kept(call: Call, inputs: Iterable[Tensor]) -> tuple[float, bool]:
    """Return MiB that one forward call keeps for backward beyond its inputs, and whether it keeps x.

    Counts storages once each. The inputs, parameters among them, are not counted: they live anyway. The
    first of ``inputs`` is x, of which is said whether it is kept, because a layer that does not keep it
    lets the producer's output go.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call.forward()
    known = [tensor.untyped_storage().data_ptr() for tensor in inputs]
    keeps_x = known[0] in storages
    extra = sum(size for pointer, size in storages.items() if pointer not in known)
    del y
    return extra / 2**20, keeps_x


def peak_mib(call: Call) -> float:
    """Return the most MiB of GPU memory that one eager forward and backward call holds above its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.backward(call.forward())
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_microseconds(call: Call, device: str) -> float:
    """Return µs of host time of one eager forward and backward call, the median over short batches.

    On a GPU this is the time to launch: the device is idle at the start of each batch and nobody waits
    for it. On a CPU it is the whole time.
    """
    batches: list[float] = []
    while len(batches) < _HOST_BATCHES and sum(batches) < _HOST_SECONDS:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            call.backward(call.forward())
        batches.append(time.perf_counter() - start)
    synchronize(device)
    return 1e6 * statistics.median(batches) / _HOST_CALLS


def trace_kernels(calls: Mapping[str, Call], device: str) -> dict[str, list[dict[str, object]]]:
    """Profile one eager call each and return its device kernels, keyed ``NAME:fwd`` and ``NAME:bwd``.

    Each kernel is {"name": str, "us": float}, in the order of their start. Empty lists on a CPU.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for name, call in calls.items():
            with torch.profiler.record_function(f"pass:{name}:fwd"):
                y = call.forward()
                synchronize(device)
            with torch.profiler.record_function(f"pass:{name}:bwd"):
                call.backward(y)
                synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _assign(events)


def _assign(events: list[dict]) -> dict[str, list[dict[str, object]]]:
    # each pass ends with a synchronisation, so a kernel belongs to the pass in whose span it started
    spans = {
        e["name"].removeprefix("pass:"): (float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith("pass:")
    }
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: float(e["ts"]))
    return {
        key: [{"name": e["name"], "us": float(e["dur"])} for e in kernels if start <= float(e["ts"]) <= end]
        for key, (start, end) in spans.items()
    }


def launches(calls: Mapping[str, Call], device: str) -> dict[str, dict[str, int]]:
    """Return the number of kernels of one eager call by provider: "fwd" and, where there is one, "bwd".

    Empty where the profiler saw no kernel at all, as on a CPU.
    """
    kernels = trace_kernels(calls, device)
    if not any(kernels.values()):
        return {}
    return {
        name: {
            key: len(kernels[f"{name}:{key}"]) for key in (("fwd",) if call.dy is None else ("fwd", "bwd"))
        }
        for name, call in calls.items()
    }


def peaks(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure the machine's ceilings on random data: copy bandwidth and the rate of a large matrix product.

    Returns:
        "copy_gb_per_s" (10⁹ bytes read plus written a second) and "matmul_tflop_per_s".
    """
    elements, side = (2**28, 8192) if device == "cuda" else (2**22, 512)
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = time_call(lambda: left @ right, device)
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
        "matmul_tflop_per_s": 2 * side**3 / product / 1e12,
    }
