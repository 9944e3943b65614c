"""The demo's pruning with SALOR, and the picture of it."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import lowrank_ops as lo

__all__ = ["Pruning", "plot_pruning"]

Densities = dict[str, tuple[float, float]]
LETTERS = ("A", "B")


class Pruning:
    """Prunes after every step of the optimizer; after the last it makes the model compact and draws.

    Args:
        model: injected with a ``SALORConfig``.
        optimizer: that of the adapters.
        steps: of the run.
        args: the command line; the picture goes to its output folder.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, args: Namespace
    ) -> None:
        self.model, self.path = model, args.out / "salor.png"
        config = next(m.config for m in model.modules() if isinstance(m, lo.FusedLoRALinear))
        try:
            self.schedule = lo.salor.PruningSchedule(model, config, optimizer=optimizer, total_steps=steps)
        except ValueError as error:
            raise SystemExit(f"finetune: {error}") from error
        self.history = {0: (1.0, 1.0)}

    def __call__(self) -> None:
        schedule = self.schedule
        schedule.step()
        if schedule.progress_at(schedule.steps) != schedule.progress_at(schedule.steps - 1):
            self.history[schedule.steps] = overall(self.model)
        if schedule.steps == schedule.total_steps:
            self.history[schedule.steps] = overall(self.model)
            left = lo.salor.densities(self.model)
            plot_pruning(self.path, self.history, left, schedule.config.structure)
            before = lo.report(self.model).trainable
            schedule.finish()
            after = lo.report(self.model).trainable
            print(f"\ncompact: {before:,} -> {after:,} trainable parameters; picture in {self.path}")


def overall(model: nn.Module) -> tuple[float, float]:
    """Return the share of entries left of all A together, and of all B."""
    total, left = [0, 0], [0, 0]
    for module in model.modules():
        if isinstance(module, lo.FusedLoRALinear):
            for i, (_, pruned) in enumerate(module.adapter.pairs()):
                total[i] += pruned.numel()
                left[i] += pruned.numel() - int(pruned.sum())
    return left[0] / total[0], left[1] / total[1]


def plot_pruning(path: Path, history: dict[int, tuple[float, float]], left: Densities, title: str) -> None:
    """Write a PNG: what was left of A and B at each step, and of each layer in the end.

    Args:
        path: the PNG; it appears by a rename when it is complete.
        history: step -> share of entries left of all A, of all B.
        left: name of a layer -> share of entries left of its A, of its B.
        title: above the plot.
    """
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    figure.suptitle(title)
    first, *others = figure.subplots(1, 3)
    for i, color in enumerate(("#2563eb", "#c2410c")):
        shares = [100 * pair[i] for pair in history.values()]
        first.step(list(history), shares, where="post", color=color, linewidth=2, label=LETTERS[i])
    first.set(xlabel="step", ylabel="entries left (%)", ylim=(0, 105), title="all layers")
    first.legend(frameon=False)
    for i, axes in enumerate(others):
        for kind, points in by_kind(left, i).items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
        axes.set(xlabel="block", ylabel="entries left (%)", title=f"{LETTERS[i]} of each layer, in the end")
        axes.set_ylim(bottom=0)
    handles, kinds = others[-1].get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside lower right", ncols=len(kinds), frameon=False)
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def by_kind(left: Densities, letter: int) -> dict[str, list[tuple[int, float]]]:
    """Return projection -> (number of the block, per cent left) of its layers; blocks count from 0."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, shares in left.items():
        kind = name.rpartition(".")[2]
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        points = found.setdefault(kind, [])
        points.append((numbers[0] if numbers else len(points), 100 * shares[letter]))
    return found
