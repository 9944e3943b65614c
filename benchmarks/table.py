"""``python -m benchmarks.table FILE``: render a results file as Markdown."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import table_step
from .env import header
from .markdown import NONE, markdown, number
from .results import load

__all__ = ["compact", "main", "render"]

_KEYS = ("R", "dropout_p", "dtype", "adapter_dtype")


def _layer(row: dict) -> str:
    return f"{row['M']} × {row['K']} → {row['N']} ({row['shape'].replace('_', ', ')})"


def _ratios(row: dict | None, floor: str) -> str:
    if row is None:
        return NONE
    if row["status"] != "ok":
        return NONE if row["status"] == "skipped" else row["status"]
    field, digits = ("ms", 3) if row["provider"] == floor else ("ratio", 2)
    parts = [number(row[key][field] if row[key] else None, digits) for key in ("fwd", "both")]
    return " / ".join(parts) + (" ms" if field == "ms" else "")


def compact(rows: list[dict], providers: Sequence[str], floor: str) -> str:
    """Render the rows of one rank and dropout: a line for each layer, a column for each provider.

    The floor's column is in ms, forward / forward and backward; every other is its ratio to the floor.
    """
    found = {row["provider"] for row in rows}
    providers = [name for name in providers if name in found]
    by_layer: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_layer.setdefault((row["M"], row["K"], row["N"], row["shape"]), {})[row["provider"]] = row
    body = []
    for cell in by_layer.values():
        first = next(iter(cell.values()))
        body.append([_layer(first), *(_ratios(cell.get(name), floor) for name in providers)])
    return markdown(["M × K → N", *providers], body)


def _details(rows: list[dict]) -> str:
    head = ["M × K → N", "provider", "fwd ms", "bwd ms", "both ms", "quartiles of both or fwd"]
    head += ["fwd ×", "bwd ×", "both ×", "of roofline", "launches", "kept MiB", "keeps x", "peak MiB"]
    head += ["host µs", "worst error ×"]
    return markdown(head, [_detail(row) for row in rows if row["status"] != "skipped"])


def _detail(row: dict) -> list[str]:
    line = [_layer(row), row["provider"]]
    if row["status"] != "ok":
        return [*line, f"{row['status']}: {row['reason']}", *[""] * 13]
    passes = [row[key] or {} for key in ("fwd", "bwd", "both")]
    whole = row["both"] or row["fwd"] or {}
    share = (row["roofline"] or {}).get("both" if row["both"] else "fwd")
    launches = "+".join(str(count) for count in (row["launches"] or {}).values())
    keeps = {True: "yes", False: "no", None: NONE}[row["keeps_x"]]
    errors = [ratio for ratio in row["gate"].values() if ratio is not None]
    return [
        *line,
        *(number(p.get("ms"), 4) for p in passes),
        f"{number(whole.get('q1'), 4)} to {number(whole.get('q3'), 4)}",
        *(number(p.get("ratio"), 3) for p in passes),
        NONE if share is None else f"{100 * share:.0f}%",
        launches or NONE,
        number(row["kept_mib"], 1),
        keeps,
        number(row["peak_mib"], 0),
        number(row["host_us"], 0),
        number(max(errors, default=None)),
    ]


def _groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _KEYS), []).append(row)
    return groups


def _title(key: tuple) -> str:
    R, dropout_p, dtype, adapter_dtype = key
    adapters = "" if adapter_dtype == dtype else f", {adapter_dtype} adapters"
    return f"r = {R}, dropout {dropout_p}, {dtype}{adapters}"


def render(data: dict) -> str:
    """Return the whole results file as Markdown: environment, ratios for each rank, every measured column."""
    if data.get("kind") == "step":
        return table_step.render(data)
    peaks, rows = data["peaks"], data["rows"]
    parts = [f"# {data['case']}", header(data["environment"])]
    if peaks:
        parts.append(
            f"Measured ceilings: copy {peaks['copy_gb_per_s']:.0f} GB/s read plus written, matrix product "
            f"{peaks['matmul_tflop_per_s']:.3g} TFLOP/s."
        )
    if rows:
        parts.append(
            f"Forward / forward + backward. `{data['floor']}` in ms, the others as a ratio to it in the same "
            "rounds."
        )
    groups = _groups(rows)
    for key, group in groups.items():
        parts.append(f"## {_title(key)}\n\n{compact(group, data['providers'], data['floor'])}")
    parts += [f"## Everything measured, {_title(key)}\n\n{_details(group)}" for key, group in groups.items()]
    if not data["complete"]:
        parts.append("Incomplete: the run was stopped, or its budget was spent, before the last cell.")
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the compact tables, or everything with ``--full``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--full", action="store_true", help="the whole file, as in the .md beside it")
    parser.add_argument("--rank", type=int, nargs="+", help="only these ranks")
    parser.add_argument("--dropout", type=float, nargs="+", help="only these dropout probabilities")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these numbers of tokens")
    parser.add_argument("--providers", nargs="+", help="only these columns; the floor is always there")
    args = parser.parse_args(argv)
    try:
        data = load(args.file)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    wanted = (("R", args.rank), ("dropout_p", args.dropout), ("M", args.tokens))
    wanted = [(key, values) for key, values in wanted if values is not None]
    rows = [row for row in data["rows"] if all(row[key] in values for key, values in wanted)]
    if args.providers and rows:
        rows = [row for row in rows if row["provider"] in {*args.providers, data["floor"]}]
    if not rows:
        sys.stderr.write(f"benchmarks: {args.file} has no such rows\n")
        return 2
    if args.full:
        sys.stdout.write(render(data | {"rows": rows}))
        return 0
    sys.stdout.write(f"{header(data['environment'])}\n")
    if data.get("kind") == "step":
        sys.stdout.write(f"\n{table_step.compact(rows, data['providers'], data['floor'])}\n")
        return 0
    for key, group in _groups(rows).items():
        sys.stdout.write(f"\n{_title(key)}\n\n{compact(group, data['providers'], data['floor'])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
