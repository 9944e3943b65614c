"""``python -m benchmarks.profile_step``: which kernels a training step of a layer, or of a case, runs."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import cases
from .case import Case, Cell, dtype_name
from .env import environment, header
from .measure import trace_kernels
from .results import write_atomic
from .step_case import StepCase, StepCell
from .timing import Call

__all__ = ["breakdown", "main"]

_WARM_UP = 5


def breakdown(
    case: Case | StepCase, cell: Cell | StepCell, providers: Sequence[str]
) -> dict[str, dict[str, list[dict]]]:
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
    parser.add_argument("--shape", help="KxN, default 4096x4096; of training steps BATCHxLENGTH, 2x4096")
    parser.add_argument("--tokens", type=int, default=8192, help="of layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--adapter-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of layers"
    )
    parser.add_argument("--providers", nargs="+", help="default: unfused ours; of training steps peft ours")
    parser.add_argument("--out", type=Path, help="folder for profile.json and profile.txt")
    args = parser.parse_args(argv)
    if args.shape is not None and re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.shape) is None:
        parser.error(f"--shape must be two numbers with an x between, got {args.shape}")
    return args


def _cell(case: Case | StepCase, args: argparse.Namespace, device: str) -> Cell | StepCell:
    shape = args.shape or ("2x4096" if isinstance(case, StepCase) else "4096x4096")
    first, second = map(int, shape.split("x"))
    shared = {"shape": shape, "R": args.rank, "dropout_p": args.dropout, "dtype": torch.bfloat16}
    if isinstance(case, StepCase):
        model = case.quick_model if device == "cpu" else case.model
        return StepCell(batch=first, length=second, model=model, device=device, **shared)
    adapter_dtype = getattr(torch, args.adapter_dtype)
    return Cell(M=args.tokens, N=second, K=first, adapter_dtype=adapter_dtype, device=device, **shared)


def _title(cell: Cell | StepCell) -> str:
    adapter = f"r={cell.R}, dropout {cell.dropout_p}"
    if isinstance(cell, StepCell):
        return f"{cell.model}, {cell.batch} x {cell.length} tokens, {adapter}"
    return f"{cell.M} x {cell.K} x {cell.N}, {adapter}, {dtype_name(cell.adapter_dtype)} adapters"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the breakdown, and with ``--out`` write it as JSON and text."""
    args = _parse(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    case, found = cases.load(args.case), environment(device)
    cell = _cell(case, args, device)
    providers = args.providers or ["peft" if isinstance(case, StepCase) else "unfused", "ours"]
    try:
        result = breakdown(case, cell, providers)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    text = f"{header(found)}\n{_title(cell)}\n{_text(result)}"
    sys.stdout.write(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        data = {"environment": found, "cell": cell.as_row(), "kernels": result}
        write_atomic(args.out / "profile.json", json.dumps(data, indent=1) + "\n")
        write_atomic(args.out / "profile.txt", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
