"""``python -m benchmarks.profile_step``: which kernels a training step of one layer runs."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cases
from .case import Case, Cell
from .env import environment, header
from .measure import trace_kernels
from .results import write_atomic
from .timing import Call

__all__ = ["breakdown", "main"]

_WARM_UP = 5


def breakdown(case: Case, cell: Cell, providers: Sequence[str]) -> dict[str, dict[str, list[dict]]]:
    """Profile one eager step of each provider.

    Returns:
        By provider, then "fwd" and "bwd": kernels in order of time, each {"name", "launches", "us"}, us
        summed over launches.
    """
    tensors = case.make_inputs(cell, torch.Generator(cell.device).manual_seed(0))
    calls = {}
    dy = None if cell.forward_only else tensors["dy"]
    for name in providers:
        calls[name] = Call(case.provider(name).build(cell, tensors), dy)
        for _ in range(_WARM_UP):
            calls[name].backward(calls[name].forward())
    kernels = trace_kernels(calls, cell.device)
    return {name: {key: _summed(kernels[f"{name}:{key}"]) for key in ("fwd", "bwd")} for name in providers}


def _summed(kernels: list[dict]) -> list[dict]:
    rows: dict[str, dict] = {}
    for kernel in kernels:
        row = rows.setdefault(kernel["name"], {"name": kernel["name"], "launches": 0, "us": 0.0})
        row["launches"] += 1
        row["us"] += kernel["us"]
    return sorted(rows.values(), key=lambda row: -row["us"])


def _text(result: dict[str, dict[str, list[dict]]]) -> str:
    lines = []
    for provider, passes in result.items():
        for key, rows in passes.items():
            total, count = sum(row["us"] for row in rows), sum(row["launches"] for row in rows)
            lines.append(f"{provider} {key}: {total:.1f} µs in {count} launches")
            lines += [f"  {row['us']:9.1f} µs  {row['launches']:3d} ×  {row['name'][:80]}" for row in rows]
    return "\n".join(lines) + "\n"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument("--case", choices=cases.names(), default="lora_linear")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="4096x4096", help="KxN")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--adapter-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--providers", nargs="+", default=["unfused", "ours"])
    parser.add_argument("--out", type=Path, help="folder for profile.json and profile.txt")
    args = parser.parse_args(argv)
    if re.fullmatch(r"\d+x\d+", args.shape) is None:
        parser.error(f"--shape must be KxN, got {args.shape}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the breakdown, and with ``--out`` write it as JSON and text."""
    args = _parse(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    K, N = map(int, args.shape.split("x"))
    cell = Cell(
        shape=args.shape,
        M=args.tokens,
        N=N,
        K=K,
        R=args.rank,
        dropout_p=args.dropout,
        dtype=torch.bfloat16,
        adapter_dtype=getattr(torch, args.adapter_dtype),
        device=device,
    )
    found = environment(device)
    try:
        result = breakdown(cases.load(args.case), cell, args.providers)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    title = f"{cell.M} x {K} x {N}, r={cell.R}, dropout {cell.dropout_p}, {args.adapter_dtype} adapters"
    text = f"{header(found)}\n{title}\n{_text(result)}"
    sys.stdout.write(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        data = {"environment": found, "cell": cell.as_row(), "kernels": result}
        write_atomic(args.out / "profile.json", json.dumps(data, indent=1) + "\n")
        write_atomic(args.out / "profile.txt", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
