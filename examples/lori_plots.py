"""Pictures of the LoRI experiment: losses of every arm, and where the entries of B are."""

import os
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import lowrank_ops as lo

__all__ = ["plot_experiment", "plot_masks"]

COLORS = {"lora": "#64748b", "lori-d": "#1d4ed8", "lori-s": "#c2410c"}
MARKERS = {"alone": "o", "cat": "s", "linear": "D", "code, then prose": "^"}
KINDS = ("#1d4ed8", "#0891b2", "#059669", "#65a30d", "#ca8a04", "#c2410c", "#9333ea")
ROWS = 192  # of the mask that is shown


def save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def plot_experiment(path: Path, results: dict) -> None:
    """Write a PNG: left the loss on both tasks of every adapter, right what is forgotten.

    Args:
        path: the PNG; it appears by a rename when it is complete.
        results: what ``lori_experiment.py`` writes to its JSON file.
    """
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    base = results["base"]
    left.scatter(base["code"], base["prose"], marker="*", s=130, color="black", zorder=3)
    left.annotate("base", (base["code"], base["prose"]), textcoords="offset points", xytext=(7, 5))
    for run in results["single"]:
        place = run["held_out_loss"]["code"], run["held_out_loss"]["prose"]
        left.scatter(*place, marker="o", color=COLORS[run["method"]], zorder=3)
        left.annotate(
            run["task"], place, textcoords="offset points", xytext=(6, 3), fontsize=8, color="#555555"
        )
    for run in results["merged"]:
        loss = run["held_out_loss"]
        left.scatter(loss["code"], loss["prose"], marker=MARKERS[run["merge"]], color=COLORS[run["method"]])
    for run in results["continual"]:
        left.scatter(run["after"]["code"], run["after"]["prose"], marker="^", color=COLORS[run["method"]])
    left.set(xlabel="held-out loss, code (nats per token)", ylabel="held-out loss, prose (nats per token)")
    marks = [Line2D([], [], ls="", marker=mark, color="black", label=name) for name, mark in MARKERS.items()]
    marks += [Line2D([], [], ls="", marker="o", color=color, label=name) for name, color in COLORS.items()]
    left.legend(handles=marks, frameon=False, fontsize=8, loc="upper right")

    names = [run["method"] for run in results["continual"]]
    forgotten = [run["forgotten"] for run in results["continual"]]
    bars = right.bar(names, forgotten, color=[COLORS[name] for name in names], width=0.55)
    right.bar_label(bars, fmt="%+.4f", padding=3)
    right.axhline(0, color="black", linewidth=0.8)
    right.margins(y=0.15)
    right.set(ylabel="rise of the loss on code (nats per token)", title="after going on with prose")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)


def plot_masks(path: Path, masks: dict[str, lo.SparseMask]) -> None:
    """Write a PNG: above a part of the fullest mask, below the density of every layer by kind of projection.

    Args:
        path: the PNG; it appears by a rename when it is complete.
        masks: name of a layer -> its mask, in the order of the layers.
    """
    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[2, 3])
    name, mask = max(masks.items(), key=lambda item: item[1].density)
    shown = mask.to_dense()[:ROWS].T.cpu().numpy()
    above.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    title = f"{name}: {100 * mask.density:.1f} % kept, outputs 1 to {shown.shape[1]} of {mask.shape[0]}"
    above.set(xlabel="output", ylabel="rank", title=title)

    kinds: dict[str, list[float]] = {}
    for layer, own in masks.items():
        kinds.setdefault(layer.rpartition(".")[2], []).append(100 * own.density)
    for (kind, densities), color in zip(kinds.items(), KINDS * len(kinds), strict=False):
        below.plot(range(len(densities)), densities, color=color, marker="o", markersize=3, label=kind)
    total = sum(own.shape[0] * own.shape[1] for own in masks.values())
    share = 100 * sum(own.nnz for own in masks.values()) / total
    below.axhline(share, color="black", linewidth=0.8, linestyle="--", label=f"{share:.0f} % in all")
    below.set(xlabel="block", ylabel="entries kept (%)", ylim=(0, None))
    below.grid(alpha=0.3)
    below.legend(frameon=False, ncols=4, fontsize=8)
    save(figure, path)
