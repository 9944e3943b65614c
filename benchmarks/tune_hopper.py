"""``python -m benchmarks.tune_hopper``: choose side programs and tile order of the Hopper launches.

Candidates are compared with the reference, then timed in the same rounds, bfloat16, without dropout; one
without side programs includes the passes that these save. ``--table`` takes over the winners into this GPU's
table, ARCH.json or ARCH-PRODUCT.json, whose other rows stay.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_ops import kernels, reference
from lowrank_ops.kernels._config import TABLES, device_facts
from lowrank_ops.kernels.hopper import HopperConfig, hopper_backward_input, hopper_forward, hopper_matmul
from lowrank_ops.kernels.hopper_lora import table_key
from lowrank_ops.testing import error_ratio

from .case import Layer
from .gate import FACTOR
from .results import write_atomic
from .timing import Call, Graphs, calls_needed, copies_needed, interleave
from .tune import measured_on, write_table

__all__ = ["OPS", "candidates", "main", "sizes_of", "winners"]

OPS = ("hopper_forward", "hopper_backward_input")
# linears, and those that share their input
_LLAMA = ("4096x4096", "4096x14336", "14336x4096", "4096x1024", "4096x4096+1024+1024", "4096x14336+14336")


class _Layers(NamedTuple):
    """Projections of one x: their tensors, and h of all side by side."""

    x: Tensor
    h: Tensor
    dys: list[Tensor]
    ws: list[Tensor]
    a_list: list[Tensor]
    b_list: list[Tensor]

    def exact(self) -> "_Layers":
        return _Layers(*[t.double() if isinstance(t, Tensor) else [own.double() for own in t] for t in self])

    def nbytes(self) -> int:
        return sum(own.nbytes for t in self for own in ([t] if isinstance(t, Tensor) else t))


def sizes_of(shape: str) -> tuple[int, tuple[int, ...]]:
    """Return K and every N of a shape as the command line spells it, KxN or KxN+N."""
    K, Ns = shape.split("x")
    return int(K), tuple(map(int, Ns.split("+")))


def candidates(M: int, P: int) -> list[HopperConfig]:
    """Return the sizes worth a try for a launch of P projections; more rows of tiles than M has are not."""
    groups = [group for group in (4, 8, 16, 32) if group <= max(8, M // 128 - 8)]
    tries = [HopperConfig(GROUP_M=group) for group in groups]
    return [*tries, HopperConfig(SIDES=0)] if P == 1 else tries


def _arguments(M: int, Ns: tuple[int, ...], K: int, R: int, generator: torch.Generator) -> _Layers:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        made = torch.randn(size, generator=generator, device=generator.device, dtype=torch.bfloat16)
        return made.mul_(std)

    return _Layers(
        normal(M, K),
        normal(M, len(Ns) * R),
        [normal(M, N) for N in Ns],
        [normal(N, K, std=K**-0.5) for N in Ns],
        [normal(R, K, std=K**-0.5) for _ in Ns],
        [normal(N, R, std=R**-0.5) for N in Ns],
    )


def _run(op: str, t: _Layers, c: HopperConfig) -> list[Tensor]:
    """Return every y, or dx."""
    scales, R = (1.0,) * len(t.ws), t.a_list[0].shape[0]
    if op == "hopper_forward":
        if c.SIDES:
            return hopper_forward(t.x, t.ws, t.a_list, t.b_list, [], scales, None, config=c)[0]
        hidden = kernels.dispatch.lora_hidden(t.x, t.a_list[0], 1.0, None, 0.0)
        return [hopper_matmul(True, t.x, t.ws[0], hidden, t.b_list[0], None, None, c)]
    if c.SIDES:
        kept = t.h if R <= 16 else None
        return [hopper_backward_input(t.dys, t.ws, t.a_list, t.b_list, kept, scales, None, config=c)[0]]
    hidden, _ = kernels.dispatch.lora_backward_hidden_b(t.dys[0], t.b_list[0], t.h, 1.0)
    return [hopper_matmul(False, t.dys[0], t.ws[0], hidden, t.a_list[0], None, None, c)]


def _definition(op: str, t: _Layers) -> list[Tensor]:
    if op == "hopper_forward":
        each = zip(t.ws, t.a_list, t.b_list, strict=True)
        return [reference.lora_forward(t.x, w, a, b, None, 1.0, None, 0.0)[0] for w, a, b in each]
    dx = torch.zeros_like(t.x)
    for dy, w, a, b in zip(t.dys, t.ws, t.a_list, t.b_list, strict=True):
        dh = reference.lora_backward_hidden(dy, b, 1.0)
        dx += reference.lora_backward_input(dy, w, dh, a, None, 0.0)
    return [dx]


def sweep(op: str, M: int, Ns: tuple[int, ...], K: int, R: int, seconds: float) -> list[dict]:
    """Return a row for each candidate, its ``ms`` None if its result is wrong."""
    generator = torch.Generator("cuda").manual_seed(0)
    first = _arguments(M, Ns, K, R, generator)
    count = copies_needed(first.nbytes(), torch.cuda.get_device_properties(0).L2_cache_size)
    copies = [first] + [_arguments(M, Ns, K, R, generator) for _ in range(count - 1)]
    baseline, truth = _definition(op, first), _definition(op, first.exact())
    repeats = calls_needed(count, 2 * M * sum(Ns) * K / 8e14) // count
    rows, runs, pool = [], {}, torch.cuda.graph_pool_handle()
    for index, c in enumerate(candidates(M, len(Ns))):
        error = max(map(error_ratio, _run(op, first, c), baseline, truth))
        rows.append({"key": table_key(op, M, Ns, K), "config": asdict(c), "error": error, "ms": None})
        if error <= FACTOR:
            bound: list[Callable[[], Tensor]] = [lambda t=t, c=c: _run(op, t, c)[0] for t in copies]
            calls = [Call(Layer(run, {}), None) for run in bound]
            runs[str(index)] = Graphs(calls * repeats, pool)
    for name, timing in interleave(runs, "cuda", seconds).items():
        rows[int(name)]["ms"] = timing["fwd"].quartiles[1]
    return rows


def winners(rows: list[dict]) -> dict[str, dict]:
    """Return the fastest sizes of each key, fields at their default left out."""
    defaults = {field.name: field.default for field in fields(HopperConfig)}
    found = {}
    for row in sorted((row for row in rows if row["ms"] is not None), key=lambda row: -row["ms"]):
        config = row["config"].items()
        found[row["key"]] = {name: value for name, value in config if value != defaults[name]}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_hopper", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=list(_LLAMA), help="KxN, or KxN+N of one input")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 2048])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.6, help="timing of one launch")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all rows")
    parser.add_argument("--table", type=Path, nargs="?", const=TABLES, help="folder; default: the package's")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.stderr.write("benchmarks: tuning these kernels needs a Hopper GPU\n")
        return 2
    torch.cuda.set_stream(torch.cuda.Stream())
    jobs = [(op, M, *sizes_of(shape)) for M in args.tokens for shape in args.shapes for op in args.ops]
    rows = []
    for op, M, K, Ns in tqdm(jobs, unit="launch"):
        rows += sweep(op, M, Ns, K, args.rank, args.seconds)
        torch.cuda.empty_cache()
        write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    if args.table:
        facts = device_facts(torch.device("cuda", 0))
        write_table(args.table, facts, winners(rows), measured_hopper=measured_on())
    return 0


if __name__ == "__main__":
    sys.exit(main())
