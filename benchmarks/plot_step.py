"""Draw the results of training steps: time over the frozen model, and memory."""

from pathlib import Path

from .figures import COLOURS, MARKERS, save, source

__all__ = ["plot"]


def plot(data: dict, path: Path, rank: int) -> None:
    """Draw the time of a step over that of the frozen model, and the memory it keeps for backward.

    A line a cell, those of compiled providers apart; they are drawn over the frozen model compiled.

    Args:
        data: a results file of training steps. path: the PNG to write. rank: which rows to draw.

    Raises:
        ValueError: no such rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in data["rows"] if row["status"] == "ok" and row["step"]]
    rows = [row for row in timed if row["R"] == rank]
    if not rows:
        known = sorted({row["R"] for row in timed})
        raise ValueError(f"benchmarks: rank must be one of {known}, got {rank}")
    names = list(dict.fromkeys(_name(name) for name in data["providers"]))
    names = [name for name in names if name in {_name(row["provider"]) for row in rows}]
    lines = list(dict.fromkeys(_line(row) for row in rows))
    figure = Figure(figsize=(10.0, 1.6 + 0.7 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    # the floor has no ratio to itself worth a mark
    _panel(left, [row for row in rows if _name(row["provider"]) != data["floor"]], _ratio, names, lines)
    left.axvline(1.0, color="0.35", linewidth=1, zorder=2)
    left.set_xlabel("time over the frozen model, compiled over compiled (smaller is better)", fontsize=9)
    _panel(right, rows, lambda row: row["activations_gib"], names, lines)
    right.set_xlabel("activations kept for backward, GiB (smaller is better)", fontsize=9)
    right.set_xlim(left=0)
    model = rows[0]["model"].replace("llama-3-8b", "Llama-3-8B")
    title = f"{data['case']}: one step of four decoder layers of {model}, r = {rank}"
    figure.suptitle(f"{title}\n{source(data)}", fontsize=10)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    save(figure, path)


def _name(provider: str) -> str:
    return provider.removesuffix("_compiled")


def _line(row: dict) -> str:
    compiled = "\ncompiled" if row["compiled"] else ""
    return f"{row['shape'].replace('x', ' × ')}, p = {row['dropout_p']}{compiled}"


def _ratio(row: dict) -> float | None:
    return row["step"]["ratio_compiled" if row["compiled"] else "ratio"]


def _panel(axis, rows: list[dict], value, names: list[str], lines: list[str]) -> None:
    for index, name in enumerate(names):
        mine = [row for row in rows if _name(row["provider"]) == name and value(row) is not None]
        offset = (index - (len(names) - 1) / 2) * 0.8 / len(names)
        if mine:
            axis.scatter(
                [value(row) for row in mine],
                [lines.index(_line(row)) + offset for row in mine],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                s=30,
                label=name,
                zorder=3,
            )
    for border in range(len(lines) - 1):
        axis.axhline(border + 0.5, color="0.85", linewidth=0.8)
    axis.set_yticks(range(len(lines)), lines, fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
