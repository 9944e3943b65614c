"""``python -m benchmarks.tune_hopper``: choose side programs and tile order of the Hopper launches.

Candidates are compared with the reference, then timed in the same rounds, bfloat16, without dropout; one
without side programs includes the passes that these save. ``--table`` takes over the winners into
``kernels/_tables/ARCH.json``, whose other rows stay.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_ops import kernels, reference
from lowrank_ops.kernels.hopper import HopperConfig, hopper_backward_input, hopper_forward, hopper_matmul
from lowrank_ops.kernels.hopper_lora import table_key
from lowrank_ops.testing import error_ratio

from .case import Layer
from .env import environment
from .gate import FACTOR
from .results import write_atomic
from .timing import Call, Graphs, calls_needed, copies_needed, interleave

__all__ = ["candidates", "main", "merged"]

OPS = ("hopper_forward", "hopper_backward_input")
_LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # (K, N)


def candidates() -> list[HopperConfig]:
    """Return the sizes worth a try."""
    return [HopperConfig(SIDES=sides, GROUP_M=group) for sides in (4, 0) for group in (4, 8, 16)]


def _arguments(M: int, N: int, K: int, R: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        made = torch.randn(size, generator=generator, device=generator.device, dtype=torch.bfloat16)
        return made.mul_(std)

    a, b = normal(R, K, std=K**-0.5), normal(N, R, std=R**-0.5)
    return normal(M, K), normal(M, N), normal(N, K, std=K**-0.5), a, b, normal(M, R)


def _run(op: str, tensors: tuple[Tensor, ...], c: HopperConfig) -> Tensor:
    """Return y or dx."""
    x, dy, w, a, b, h = tensors
    if op == "hopper_forward":
        if c.SIDES:
            return hopper_forward(x, [w], [a], [b], [], (1.0,), None, config=c)[0][0]
        hidden = kernels.dispatch.lora_hidden(x, a, 1.0, None, 0.0)
        return hopper_matmul(True, x, w, hidden, b, None, None, c)
    if c.SIDES:
        kept = h if h.shape[1] <= 16 else None
        return hopper_backward_input([dy], [w], [a], [b], kept, (1.0,), None, config=c)[0]
    hidden, _ = kernels.dispatch.lora_backward_hidden_b(dy, b, h, 1.0)
    return hopper_matmul(False, dy, w, hidden, a, None, None, c)


def _definition(op: str, tensors: tuple[Tensor, ...]) -> Tensor:
    x, dy, w, a, b, _ = tensors
    if op == "hopper_forward":
        return reference.lora_forward(x, w, a, b, None, 1.0, None, 0.0)[0]
    return reference.lora_backward_input(dy, w, reference.lora_backward_hidden(dy, b, 1.0), a, None, 0.0)


def sweep(op: str, M: int, N: int, K: int, R: int, seconds: float) -> list[dict]:
    """Return a row for each candidate, its ``ms`` None if its result is wrong."""
    generator = torch.Generator("cuda").manual_seed(0)
    first = _arguments(M, N, K, R, generator)
    count = copies_needed(sum(t.nbytes for t in first), torch.cuda.get_device_properties(0).L2_cache_size)
    copies = [first] + [_arguments(M, N, K, R, generator) for _ in range(count - 1)]
    baseline, truth = _definition(op, first), _definition(op, tuple(t.double() for t in first))
    repeats = calls_needed(count, 2 * M * N * K / 8e14) // count
    rows, runs, pool = [], {}, torch.cuda.graph_pool_handle()
    for index, c in enumerate(candidates()):
        error = error_ratio(_run(op, first, c), baseline, truth)
        rows.append({"key": table_key(op, M, N, K), "config": asdict(c), "error": error, "ms": None})
        if error <= FACTOR:
            bound: list[Callable[[], Tensor]] = [lambda t=t, c=c: _run(op, t, c) for t in copies]
            calls = [Call(Layer(run, {}), None) for run in bound]
            runs[str(index)] = Graphs(calls * repeats, pool)
    for name, timing in interleave(runs, "cuda", seconds).items():
        rows[int(name)]["ms"] = timing["fwd"].quartiles[1]
    return rows


def merged(table: dict, rows: list[dict], measured: str) -> dict:
    """Return ``table`` with the fastest sizes of each key, fields at their default left out."""
    defaults = {field.name: field.default for field in fields(HopperConfig)}
    found = dict(table["rows"])
    for row in sorted((row for row in rows if row["ms"] is not None), key=lambda row: -row["ms"]):
        config = row["config"].items()
        found[row["key"]] = {name: value for name, value in config if value != defaults[name]}
    return table | {"measured_hopper": measured, "rows": dict(sorted(found.items()))}


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_hopper", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{K}x{N}" for K, N in _LLAMA], help="KxN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 4096, 2048])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of one launch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all rows")
    parser.add_argument("--table", type=Path, help="JSON file to update, as kernels/_tables/sm90.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stderr.write("benchmarks: tuning these kernels needs a Hopper GPU\n")
        return 2
    sizes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    torch.cuda.set_stream(torch.cuda.Stream())
    jobs = [(op, M, N, K) for M in args.tokens for K, N in sizes for op in OPS]
    rows = []
    for op, M, N, K in tqdm(jobs, unit="launch"):
        rows += sweep(op, M, N, K, args.rank, args.seconds)
        torch.cuda.empty_cache()
        write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    if args.table:
        found = environment("cuda")
        measured = f"{found['gpu']}, torch {found['torch']}, Triton {found['triton']}, {found['date']}"
        table = merged(json.loads(args.table.read_text()), rows, measured)
        write_atomic(args.table, json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
