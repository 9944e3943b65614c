"""``python -m benchmarks.plot FILE``: draw a results file as a PNG."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import plot_step
from .figures import COLOURS, MARKERS, save, source
from .results import load

__all__ = ["main", "plot"]


def _select(data: dict, rank: int, tokens: int) -> list[dict]:
    timed = [row for row in data["rows"] if row["status"] == "ok" and row["fwd"]]
    rows = [row for row in timed if row["R"] == rank and row["M"] == tokens]
    if not rows:
        known = sorted({(row["R"], row["M"]) for row in timed})
        raise ValueError(f"benchmarks: rank and tokens must be one of {known}, got {(rank, tokens)}")
    return rows


def plot(data: dict, path: Path, rank: int, tokens: int) -> None:
    """Draw the time of each provider over that of the frozen layer: a panel a dropout, a group a shape.

    Times are forward and backward; of inference, forward. Values to the right of 1 are the adapter's price.

    Args:
        data: a results file. path: the PNG to write. rank, tokens: which rows to draw.

    Raises:
        ValueError: no such rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _select(data, rank, tokens)
    floor, found = data["floor"], {row["provider"] for row in rows}
    key, what = ("both", "forward + backward") if rows[0]["both"] else ("fwd", "forward")
    dropouts = sorted({row["dropout_p"] for row in rows})
    shapes = list(dict.fromkeys((row["shape"], row["K"], row["N"]) for row in rows))
    names = [name for name in data["providers"] if name in found and name != floor]
    figure = Figure(figsize=(9.0, 1.4 + 0.9 * len(shapes) * max(1, len(names) / 6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(dropouts), sharex=True, sharey=True, squeeze=False)[0]
    for axis, dropout_p in zip(axes, dropouts, strict=True):
        _panel(axis, [row for row in rows if row["dropout_p"] == dropout_p], key, shapes, names)
        axis.set_title(f"dropout {dropout_p}", fontsize=10)
        axis.set_xlabel(f"time over the {floor} linear (smaller is better)", fontsize=9)
    title = f"{data['case']}, {what}, {tokens} tokens, r = {rank}"
    figure.suptitle(f"{title}\n{source(data)}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save(figure, path)


def _panel(axis, rows: list[dict], key: str, shapes: list[tuple], names: list[str]) -> None:
    for index, name in enumerate(names):
        mine = [row for row in rows if row["provider"] == name and row[key]["ratio"] is not None]
        offset = (index - (len(names) - 1) / 2) * 0.8 / max(len(names), 1)
        axis.scatter(
            [row[key]["ratio"] for row in mine],
            [shapes.index((row["shape"], row["K"], row["N"])) + offset for row in mine],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            s=30,
            label=name,
            zorder=3,
        )
    axis.axvline(1.0, color="0.35", linewidth=1, zorder=2)
    for border in range(len(shapes) - 1):
        axis.axhline(border + 0.5, color="0.85", linewidth=0.8)
    axis.set_yticks(
        range(len(shapes)), [f"{shape.replace('_', ', ')}\n{K} → {N}" for shape, K, N in shapes], fontsize=9
    )
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw ``FILE`` as a PNG beside it, or at ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="default: the file's name with .png")
    parser.add_argument("--rank", type=int, help="default: that of the first row")
    parser.add_argument("--tokens", type=int, help="default: those of the first row; of steps, all")
    args = parser.parse_args(argv)
    out = args.out or args.file.with_suffix(".png")
    try:
        data = load(args.file)
        if not data["rows"]:
            raise ValueError(f"benchmarks: {args.file} must have rows, got none")
        first = data["rows"][0]
        if data.get("kind") == "step":
            plot_step.plot(data, out, args.rank or first["R"])
        else:
            plot(data, out, args.rank or first["R"], args.tokens or first["M"])
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{os.path.relpath(out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
