"""``python -m benchmarks.mixed_ranks``: a model of 30 different ranks against one of the same mean rank.

Counts what Triton compiles for the mixed model, kernel by kernel, and compares the time of training steps,
forward and backward, of the two models in the same rounds: eager and from CUDA graphs, with adapters in
float32 and in the type of the model.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import lowrank_ops as lo

from .env import environment, header, slug
from .results import write_atomic

__all__ = ["RANKS", "compilations", "main", "make_model"]

# thirty different ranks each, the mean of the first set 16 and of the second 256
RANKS = {
    "1 to 31": [rank for rank in range(1, 32) if rank != 16],
    "1 to 511": [*(1 + 17 * i for i in range(15)), *(511 - 17 * i for i in range(15))],
}


def make_model(
    ranks: Sequence[int],
    size: int,
    device: str,
    dtype: torch.dtype,
    adapters: torch.dtype = torch.float32,
) -> nn.Module:
    """Return a stack of square linear layers, frozen, with a LoRA adapter of each rank in ``ranks``."""
    torch.manual_seed(0)
    with torch.device(device):
        layers = [nn.Linear(size, size, bias=False, dtype=dtype) for _ in ranks]
    model = nn.Sequential(*layers)
    pattern = {f"^{i}": rank for i, rank in enumerate(ranks)}
    alphas = {name: 2 * rank for name, rank in pattern.items()}
    lo.inject(model, lo.LoRAConfig(r=1, lora_alpha=2, rank_pattern=pattern, alpha_pattern=alphas))
    for layer in model:
        nn.init.normal_(layer.adapter.b, std=0.01)
        layer.adapter.to(adapters)
    return model


def compilations() -> dict[str, int]:
    """Return how many variants of each Triton kernel this process has compiled or loaded."""
    from triton.runtime.jit import JITFunction

    found = {}
    for module in [m for n, m in sys.modules.items() if n.startswith("lowrank_ops.kernels")]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                count = sum(len(cache[0]) for cache in value.device_caches.values())
                if count:
                    found[value.__name__] = count
    return found


def step(model: nn.Module, x: torch.Tensor) -> None:
    """One training step without its optimizer."""
    model(x).backward(x)
    model.zero_grad(set_to_none=True)


def graphed(function: Callable[[], None]) -> Callable[[], None]:
    """Return ``function``, called before, as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def launches(function: Callable[[], None]) -> int:
    """Return how many kernels, copies and fills a call of ``function`` starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def seconds(function: Callable[[], None], device: str) -> float:
    """Return the time of a call, the device's work included."""
    begin = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def times_of(steps: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, object]:
    """Return step times of mixed and uniform, ms, medians of rounds that time both, and their ratio."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        for name in list(steps) if turn % 2 else reversed(steps):
            taken = seconds(steps[name], device)
            if turn >= 3:
                times[name].append(1e3 * taken)
    ratios = [m / u for m, u in zip(times["mixed"], times["uniform"], strict=True)]
    ms = {name: statistics.median(values) for name, values in times.items()}
    return {"ms": ms, "ratio": statistics.median(ratios)}


def compare(
    ranks: list[int],
    M: int,
    size: int,
    device: str,
    dtype: torch.dtype,
    adapters: torch.dtype,
    rounds: int,
) -> dict[str, object]:
    """Return compilations of the mixed model; launches and times of a step, eager and from a CUDA graph."""
    mean = round(sum(ranks) / len(ranks))
    x = torch.randn(M, size, device=device, dtype=dtype)
    before = compilations() if device == "cuda" else {}
    mixed = make_model(ranks, size, device, dtype, adapters)
    begin = time.perf_counter()
    step(mixed, x)
    first = time.perf_counter() - begin
    after = compilations() if device == "cuda" else {}
    models = {"mixed": mixed, "uniform": make_model([mean] * len(ranks), size, device, dtype, adapters)}
    steps = {name: partial(step, model, x) for name, model in models.items()}
    row = {
        "ranks": ranks,
        "uniform_rank": mean,
        "compilations": {name: n - before.get(name, 0) for name, n in after.items()},
        "first_step_s": first,
        "eager": times_of(steps, device, rounds),
    }
    if device == "cuda":
        row["launches"] = {name: launches(run) for name, run in steps.items()}
        row["graph"] = times_of({name: graphed(run) for name, run in steps.items()}, device, rounds)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed_ranks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="commit to record where the sources lie outside git")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = environment(device, args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"mixed_ranks-{slug(found)}-{found['date']}.json"
    data = {"environment": found, "tokens": args.tokens, "size": args.size, "rows": {}}
    print(header(found))
    for (name, ranks), adapters in tqdm(list(product(RANKS.items(), dict.fromkeys((torch.float32, dtype))))):
        row = compare(ranks, args.tokens, args.size, device, dtype, adapters, args.rounds)
        name = f"{name}, {str(adapters).removeprefix('torch.')} adapters"
        data["rows"][name] = row
        write_atomic(path, json.dumps(data, indent=1) + "\n")
        tqdm.write(f"{name}: {json.dumps(row)}", file=sys.stdout)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
