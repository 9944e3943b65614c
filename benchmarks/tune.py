"""``python -m benchmarks.tune``: time tile sizes of the Triton kernels on this GPU.

Every candidate is first compared with the reference, then timed as ``benchmarks.run`` times; the fastest
few of each launch are timed again in the same rounds, because a GPU's clock drifts, and cuBLAS with them.
Writes a JSON list of rows after each launch, and with ``--table`` the winning GEMMs into this GPU's table,
ARCH.json or ARCH-PRODUCT.json, whose other rows stay. The skinny passes have no table: their rows are what
the heuristics of ``kernels/_config.py`` are read from.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_ops import kernels, reference
from lowrank_ops.kernels import DeviceFacts, TileConfig
from lowrank_ops.kernels._config import TABLES, device_facts, pick, table_names
from lowrank_ops.testing import error_ratio

from .case import Layer
from .env import environment
from .gate import FACTOR
from .isolation import FAILURES
from .results import write_atomic
from .timing import Call, Graphs, calls_needed, copies_needed, interleave

__all__ = [
    "OPS",
    "Shape",
    "candidates",
    "main",
    "measured_on",
    "sweep",
    "table_key",
    "time_config",
    "winners",
    "write_table",
]

OPS = ("lora_hidden", "lora_forward", "lora_backward_hidden_b", "lora_backward_a", "lora_backward_input")
_GEMMS = ("lora_forward", "lora_backward_input")
_SCALE = 2.0
_FINALISTS = 5
_LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # (K, N)


@dataclass(frozen=True)
class Shape:
    """Sizes of one launch, and dropout as a probability."""

    M: int
    N: int
    K: int
    R: int
    dropout_p: float = 0.0


def table_key(op: str, shape: Shape) -> str:
    """Return the key under which ``kernels.pick`` looks a GEMM up; that of a skinny pass also has its R."""
    M = 1 << max(shape.M - 1, 0).bit_length()
    if op in _GEMMS:
        return f"{op} M={M} N={shape.N} K={shape.K}"
    size = f"N={shape.N}" if op == "lora_backward_hidden_b" else f"K={shape.K}"
    return f"{op} M={M} {size} R={shape.R} p={shape.dropout_p}"


def _gemm_candidates(shape: Shape) -> list[TileConfig]:
    if shape.M <= 32:
        sizes = itertools.product((16, 32), (32, 64, 128), (128, 256), (2, 4), (3, 4, 5))
        return [
            TileConfig(BLOCK_ROWS=r, BLOCK_COLS=c, BLOCK_DEPTH=d, num_warps=w, num_stages=s)
            for r, c, d, w, s in sizes
        ]
    large = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
    small = [(128, 128, 64, 4, 3), (128, 128, 32, 4, 4), (64, 256, 64, 4, 4), (128, 64, 64, 4, 4)]
    small += [(64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (32, 128, 128, 4, 3)]
    return [
        TileConfig(
            BLOCK_ROWS=r,
            BLOCK_COLS=c,
            BLOCK_DEPTH=d,
            GROUP_ROWS=group,
            PERSISTENT=persistent,
            DESCRIPTORS=descriptors,
            num_warps=w,
            num_stages=s,
        )
        for (r, c, d, w, s), descriptors, persistent, group in itertools.product(
            large + small, (True, False), (0, 1), (8, 16)
        )
    ]


def _skinny_candidates(op: str, shape: Shape) -> list[TileConfig]:
    along_rows = op == "lora_hidden"
    splits = (1, 2, 4, 8) if along_rows else (1, 2, 4, 8, 16, 32)
    blocks = itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4), splits)
    return [
        TileConfig(
            BLOCK_ROWS=rows,
            BLOCK_COLS=0 if along_rows else width,
            BLOCK_DEPTH=width if along_rows else 0,
            SPLIT=split,
            num_warps=warps,
            num_stages=stages,
        )
        for rows, width, warps, stages, split in blocks
        if rows <= max(16, shape.M)
    ]


def candidates(op: str, shape: Shape) -> list[TileConfig]:
    """Return the tile sizes worth a try for a launch, in no particular order.

    Raises:
        ValueError: ``op`` is none of ``OPS``.
    """
    if op not in OPS:
        raise ValueError(f"benchmarks: op must be one of {', '.join(OPS)}, got {op}")
    return _gemm_candidates(shape) if op in _GEMMS else _skinny_candidates(op, shape)


def _arguments(op: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[object, ...]:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=dtype).mul_(std)

    M, N, K, R, p = shape.M, shape.N, shape.K, shape.R, shape.dropout_p
    seed = torch.full((1,), 12345, device=generator.device) if p else None
    if op == "lora_hidden":
        return normal(M, K), normal(R, K, std=K**-0.5), _SCALE, seed, p
    if op == "lora_forward":
        a, b = normal(R, K, std=K**-0.5), normal(N, R, std=R**-0.5)
        return normal(M, K), normal(N, K, std=K**-0.5), a, b, None, _SCALE, seed, p
    if op == "lora_backward_hidden_b":
        return normal(M, N), normal(N, R, std=R**-0.5), normal(M, R), _SCALE
    if op == "lora_backward_a":
        return normal(M, R), normal(M, K), seed, p
    return normal(M, N), normal(N, K, std=K**-0.5), normal(M, R), normal(R, K, std=K**-0.5), seed, p


def _cublas(op: str, arguments: tuple) -> Tensor | tuple[Tensor, ...] | None:
    """Run the launch as library products and one pass at most; None where dropout needs a kernel."""
    if op == "lora_backward_hidden_b":
        dy, b, h, scale = arguments
        return torch.addmm(b.new_empty(1, 1), dy, b, beta=0, alpha=scale), dy.T @ h
    if op == "lora_forward":
        x, w, a, b, _, scale, seed, dropout_p = arguments
        h = kernels.lora_hidden(x, a, scale, seed, dropout_p)
        return (x @ w.T).addmm_(h, b.T)
    if arguments[-2] is not None:
        return None
    if op == "lora_hidden":
        x, a, scale, _, _ = arguments
        return torch.addmm(x.new_empty(1, 1), x, a.T, beta=0, alpha=scale)
    if op == "lora_backward_a":
        return arguments[0].T @ arguments[1]
    dy, w, dh, a, _, _ = arguments
    return (dy @ w).addmm_(dh, a)


def _exact(arguments: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)


def _as_tuple(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    # no mask is kept without dropout
    results = result if isinstance(result, tuple) else (result,)
    return tuple(t for t in results if t is not None)


class Launch:
    """One launch on rotating inputs, with what the reference says of the first set."""

    def __init__(self, op: str, shape: Shape, dtype: torch.dtype = torch.bfloat16):
        self.op, self.function, self.definition = op, getattr(kernels, op), getattr(reference, op)
        generator = torch.Generator("cuda").manual_seed(0)
        first = _arguments(op, shape, dtype, generator)
        size = sum(t.nbytes for t in first if isinstance(t, Tensor))
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 * 2**20)
        count = copies_needed(size, l2)
        self.copies = [first] + [_arguments(op, shape, dtype, generator) for _ in range(count - 1)]
        self.baseline = _as_tuple(self.definition(*first))
        self.truth = _as_tuple(self.definition(*_exact(first)))
        flops = 2 * shape.M * (shape.N * shape.K if op in _GEMMS else max(shape.N, shape.K) * shape.R)
        # the order of an H100's ceilings: it only decides how many calls share a graph
        self.repeats = calls_needed(count, max(size / 3e12, flops / 8e14)) // count

    def check(self, config: TileConfig) -> None:
        """Raise ValueError if the launch is less accurate than unfused PyTorch allows."""
        actual = _as_tuple(self.function(*self.copies[0], config=config))
        worst = max(map(error_ratio, actual, self.baseline, self.truth))
        if not worst <= FACTOR:
            raise ValueError(f"error is {worst:.2f} x that of unfused PyTorch, at most {FACTOR} passes")

    def graph(self, config: TileConfig | None, pool: object) -> Graphs:
        """Capture the launch on all copies; by cuBLAS if ``config`` is None."""

        def bind(arguments: tuple) -> Layer:
            if config is None:
                return Layer(lambda: _cublas(self.op, arguments), {})
            return Layer(lambda: self.function(*arguments, config=config), {})

        return Graphs([Call(bind(copy), None) for copy in self.copies] * self.repeats, pool)


def time_config(launch: Launch, config: TileConfig, seconds: float = 0.03) -> float:
    """Return the median ms of a launch with ``config``.

    Raises:
        ValueError: the result is wrong. Whatever Triton raises for tiles that don't compile or don't fit.
    """
    launch.check(config)
    run = launch.graph(config, torch.cuda.graph_pool_handle())
    return interleave({"config": run}, "cuda", seconds)["config"]["fwd"].quartiles[1]


def _final(launch: Launch, rows: list[dict]) -> None:
    best = sorted((row for row in rows if row["ms"] is not None), key=lambda row: row["ms"])[:_FINALISTS]
    pool = torch.cuda.graph_pool_handle()
    runs = {str(i): launch.graph(TileConfig(**row["config"]), pool) for i, row in enumerate(best)}
    if not runs:
        return
    if _cublas(launch.op, launch.copies[0]) is not None:
        runs["cublas"] = launch.graph(None, pool)
    medians = {name: timing["fwd"].quartiles[1] for name, timing in interleave(runs, "cuda", 0.5).items()}
    for index, row in enumerate(best):
        row.update(final_ms=medians[str(index)], cublas_ms=medians.get("cublas"))


def sweep(op: str, shape: Shape, deadline: float, limit: int | None) -> list[dict]:
    """Time candidates until ``deadline`` (of time.monotonic) and return a row each.

    Args:
        limit: take about this many, evenly spread over the list, and of a GEMM what ``pick`` takes now; None
            takes all.
    """
    launch, rows = Launch(op, shape), []
    tries = candidates(op, shape)
    tries = tries[:: max(1, len(tries) // limit)] if limit else tries
    if op in _GEMMS:
        # what runs now is one of them, whatever the limit
        sizes = (shape.M, shape.N, shape.K, shape.R, torch.bfloat16, device_facts(torch.device("cuda", 0)))
        now = replace(pick(op, *sizes, dropout=shape.dropout_p > 0), CUBLAS=False)
        tries = [now, *[config for config in tries if config != now]]
    for config in tqdm(tries, desc=table_key(op, shape), leave=False):
        if time.monotonic() > deadline:
            break
        row = {"op": op, **asdict(shape), "key": table_key(op, shape), "config": asdict(config)}
        row |= {"ms": None, "final_ms": None, "cublas_ms": None, "error": None}
        try:
            row["ms"] = time_config(launch, config)
        except FAILURES as error:
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        rows.append(row)
    _final(launch, rows)
    return rows


def winners(rows: list[dict]) -> dict[str, dict]:
    """Return the fastest tiles of each key, fields at their default left out; CUBLAS where that is faster."""
    defaults = {field.name: field.default for field in fields(TileConfig)}
    best: dict[str, dict] = {}
    for row in sorted((row for row in rows if row["final_ms"] is not None), key=lambda row: row["final_ms"]):
        best.setdefault(row["key"], row)
    found = {}
    for key, row in sorted(best.items()):
        config = row["config"] | {"CUBLAS": (row["cublas_ms"] or float("inf")) < row["final_ms"]}
        found[key] = {name: value for name, value in config.items() if value != defaults[name]}
    return found


def measured_on() -> str:
    """Return what a table says of how its rows were measured."""
    found = environment("cuda")
    return f"{found['gpu']}, torch {found['torch']}, Triton {found['triton']}, bfloat16, {found['date']}"


def write_table(folder: Path, facts: DeviceFacts, rows: dict[str, dict], **notes: str) -> Path:
    """Put ``rows`` and ``notes`` into the table of a device, whose other rows stay; return its path.

    It is the last of ``table_names``, as in ``kernels/_tables``, and may not exist yet.
    """
    path = folder / table_names(facts)[-1]
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    found |= notes | {"rows": dict(sorted((found["rows"] | rows).items()))}
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=[f"{K}x{N}" for K, N in _LLAMA], help="KxN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--limit", type=int, help="candidates a launch")
    parser.add_argument("--seconds", type=float, default=540.0, help="budget of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--table", type=Path, nargs="?", const=TABLES, help="folder; default: the package's")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks: tuning needs a GPU that torch can see\n")
        return 2
    sizes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    shapes = [Shape(M, N, K, R, args.dropout) for R in args.ranks for M in args.tokens for K, N in sizes]
    jobs = {table_key(op, shape): (op, shape) for shape in shapes for op in args.ops}  # equal keys once
    begin, rows = time.monotonic(), []
    gc.freeze()  # each capture collects garbage: what is imported need not be looked at
    torch.cuda.set_stream(torch.cuda.Stream())
    for index, (op, shape) in enumerate(jobs.values()):
        now = time.monotonic()
        share = max(0.0, args.seconds - (now - begin)) / (len(jobs) - index)
        rows += sweep(op, shape, now + share, args.limit)
        torch.cuda.empty_cache()
        write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
        if args.table:
            won = winners([row for row in rows if row["op"] in _GEMMS])
            write_table(args.table, device_facts(torch.device("cuda", 0)), won, measured=measured_on())
    for key, config in winners(rows).items():
        sys.stdout.write(f"{key}: {config}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
