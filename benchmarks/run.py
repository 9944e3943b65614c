"""``python -m benchmarks.run CASE``: gate, time and write a table and a JSON file.

For each cell (shape, tokens, rank, dropout) the providers are first compared with float64, whole models with
float32; those that are less accurate than 1.5 times unfused PyTorch are reported as wrong and not timed. The
results file is rewritten after every cell, so that a run that is stopped keeps what it measured.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases, table
from .case import Case, Cell, Provider
from .env import environment, header
from .measure import peaks
from .measure_cell import DeviceLost, Machine, count_launches, measure_cell, new_row
from .measure_step import measure_steps
from .options import Options, chosen_shapes
from .results import Results, load, write_atomic
from .step_case import StepCase

__all__ = ["Options", "cells", "main", "run"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MAX_RESTARTS = 3
_LAUNCHES_SHARE = 0.1  # of the budget, kept for counting launches at the end


def cells(case: Case, options: Options) -> list[Cell]:
    """Return the cells in the order of their importance: by rank, then tokens, then shape, then dropout.

    One token is inference and has no dropout.
    """
    return [
        Cell(
            shape=shape,
            M=M,
            N=N,
            K=K,
            R=R,
            dropout_p=dropout_p,
            dtype=options.dtype,
            adapter_dtype=options.adapter_dtype or options.dtype,
            device=options.device,
        )
        for R in options.ranks
        for M in options.tokens
        for shape, (N, K) in chosen_shapes(case, options).items()
        for dropout_p in options.dropouts
        if M > 1 or dropout_p == 0
    ]


def _providers(case: Case, cell: Cell, options: Options) -> list[Provider]:
    if options.providers is None:
        left_out = {"auto": "ours_triton", "triton": "ours", None: None}[options.impl]
        return [p for p in case.providers if p.by_default(cell) and p.name != left_out]
    wanted = {case.provider(name).name for name in options.providers} | {case.floor}
    return [p for p in case.providers if p.name in wanted]


def _machine(results: Results, options: Options) -> Machine:
    if not results.data["peaks"]:
        results.data["peaks"] = peaks(options.device, options.dtype)
        results.write()
    measured = results.data["peaks"]
    return Machine(
        copy_bytes_per_s=measured["copy_gb_per_s"] * 1e9,
        flop_per_s=measured["matmul_tflop_per_s"] * 1e12,
        l2_bytes=(results.data["environment"].get("l2_mib") or 0) * 2**20,
    )


def _timed_seconds(options: Options, cell_seconds: float) -> float:
    if options.quick and options.device == "cpu":
        return 0.02
    # about a third of a cell's time goes into timed rounds: the rest makes and checks inputs, and captures
    return min(2.5, max(0.3, 0.35 * cell_seconds))


def _measure_layers(case: Case, options: Options, results: Results, deadline: float) -> None:
    machine = _machine(results, options)
    todo = cells(case, options)
    reserve = _LAUNCHES_SHARE * options.seconds
    progress = tqdm(todo, desc=case.name, unit="cell")
    for index, cell in enumerate(progress):  # the most important first: a budget cuts from the end
        progress.set_postfix_str(f"{cell.M} x {cell.K} x {cell.N}, r={cell.R}, p={cell.dropout_p}")
        done = results.rows(cell)
        providers = [p for p in _providers(case, cell, options) if p.name not in done]
        left = deadline - reserve - time.monotonic()
        if left <= 0:
            reason = f"the budget of {options.seconds:.0f} s was spent"
            results.add([new_row(cell, p.name, "skipped", reason) for p in providers])
        elif providers:
            seconds = _timed_seconds(options, left / (len(todo) - index))
            results.add(measure_cell(case, cell, providers, machine, seconds))
        if index == 0:
            # all is imported by now and lives to the end: the collections before captures can pass it over
            gc.freeze()
    for cell in tqdm(todo, desc="launches", unit="cell", disable=options.device == "cpu"):
        if time.monotonic() < deadline:
            count_launches(case, cell, results.rows(cell))
            results.write()


def run(case: Case | StepCase, options: Options) -> Path:
    """Measure a case and return the path of its results file; the table lies beside it as ``.md``.

    Raises:
        ValueError: an option does not fit the case.
        RuntimeError: CUDA was asked for and is not there.
        DeviceLost: the device stopped answering; what was measured is in ``error.path``.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("benchmarks: device must be cpu where torch sees no GPU, got cuda")
    for name in options.providers or ():
        case.provider(name)
    chosen_shapes(case, options)
    deadline = time.monotonic() + options.seconds
    if options.resume:
        results = Results.resume(options.resume)
    else:
        found = environment(options.device, options.commit)
        results = Results.create(options.out, case, found, options.as_json(case))
    tqdm.write(header(results.data["environment"]), file=sys.stderr)
    try:
        if isinstance(case, StepCase):
            measure_steps(case, options, results, deadline)
        elif options.device == "cuda":
            # graphs are captured on the stream that all before them ran on, and it can't be the default one
            with torch.cuda.stream(torch.cuda.Stream()):
                _measure_layers(case, options, results, deadline)
        else:
            _measure_layers(case, options, results, deadline)
        results.data["complete"] = not any(row["status"] == "skipped" for row in results.data["rows"])
    except DeviceLost as error:
        results.data["rows"].extend(error.rows)
        error.path = results.path
        raise
    finally:
        gc.unfreeze()
        results.write()
        write_atomic(results.path.with_suffix(".md"), table.render(results.data))
    return results.path


def _defaults(case: Case | StepCase, device: str, quick: bool) -> dict[str, object]:
    found: dict[str, object] = {"seconds": 60.0} if quick else {}
    if isinstance(case, StepCase):
        own = {"ranks": case.ranks, "tokens": (), "dropouts": case.dropouts, "seconds": case.seconds}
        return own | found
    found |= {name: getattr(case, name) for name in ("tokens", "dropouts") if getattr(case, name) is not None}
    if quick:
        ranks, tokens = ((4,), (32, 1)) if device == "cpu" else ((16,), (8192, 512, 1))
        found |= {"ranks": ranks, "tokens": tokens}
    return found


def _check_step_flags(args: argparse.Namespace) -> None:
    for flag, value in (("tokens", args.tokens), ("impl", args.impl)):
        if value is not None:
            raise ValueError(f"{args.case}: --{flag} must be left out, got {value}; see --shapes")
    if args.adapter_dtype != "same":
        raise ValueError(
            f"{args.case}: --adapter-dtype must be left out, got {args.adapter_dtype}; providers say it"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=cases.names())
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", nargs="+", help="names, or KxN; of training steps BATCHxLENGTH")
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dropout", nargs="+", type=float)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--adapter-dtype", choices=("same", *_DTYPES), default="same")
    parser.add_argument("--impl", choices=("auto", "triton"), help="of ours, time this one only")
    parser.add_argument("--providers", nargs="+", help="default: all that fit the cell")
    parser.add_argument("--out", type=Path, default=Options.out)
    parser.add_argument("--seconds", type=float, help="budget of the whole run")
    parser.add_argument("--quick", action="store_true", help="one shape, few cells; on a CPU tiny ones")
    parser.add_argument("--resume", type=Path, help="go on with this results file")
    parser.add_argument("--commit", help="commit to record where the sources lie outside git")
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Options]:
    args = _parser().parse_args(argv)
    case = cases.load(args.case)
    if isinstance(case, StepCase):
        _check_step_flags(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {
        "shapes": args.shapes,
        "ranks": args.ranks,
        "tokens": args.tokens,
        "dropouts": args.dropout,
        "providers": args.providers,
        "seconds": args.seconds,
    }
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if v is not None}
    options = Options(
        device=device,
        dtype=_DTYPES[args.dtype],
        adapter_dtype=None if args.adapter_dtype == "same" else _DTYPES[args.adapter_dtype],
        impl=args.impl,
        out=args.out,
        quick=args.quick,
        resume=args.resume,
        commit=args.commit,
        **_defaults(case, device, args.quick) | given,
    )
    return args, options


def _restart(argv: Sequence[str], path: Path, restarts: int, seconds: float) -> None:
    extra = ["--resume", str(path), "--restarts", str(restarts + 1), "--seconds", str(seconds)]
    # exec, so that the memory of the lost device goes with this process
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *argv, *extra])


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line and return the exit status: 1 where something was wrong or failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    begin = time.monotonic()
    try:
        args, options = _parse(argv)
        path = run(cases.load(args.case), options)
    except DeviceLost as error:
        tqdm.write(f"the device stopped answering: {error}", file=sys.stderr)
        left = options.seconds - (time.monotonic() - begin)
        if args.restarts < _MAX_RESTARTS and left > 0:
            _restart(argv, error.path, args.restarts, left)
        return 1
    except (ValueError, RuntimeError) as error:
        tqdm.write(str(error), file=sys.stderr)
        return 2
    sys.stdout.write(path.with_suffix(".md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\n{os.path.relpath(path)}\n")
    statuses = {row["status"] for row in load(path)["rows"]}
    return 1 if statuses & {"wrong", "failed"} else 0


if __name__ == "__main__":
    sys.exit(main())
