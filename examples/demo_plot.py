"""The demo's loss curve."""

import os
from pathlib import Path

from matplotlib.figure import Figure

__all__ = ["plot_losses"]


def plot_losses(path: Path, train: list[float], held_out: dict[int, float], title: str, tokens: int) -> None:
    """Write a PNG of the loss of each step, and of held-out text at the steps where it was measured.

    Args:
        path: the PNG; it appears by a rename when it is complete.
        train: loss of step 1, 2, ..., in nats per token.
        held_out: step -> loss in nats per token; step 0 is before training.
        title: above the plot.
        tokens: tokens in one step, for the label of the axis.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        range(1, len(train) + 1), train, color="#9aa5b1", linewidth=1.2, label="training text, each step"
    )
    axes.plot(
        list(held_out),
        list(held_out.values()),
        color="#c2410c",
        marker="o",
        linewidth=2.2,
        label="held-out text",
    )
    for step in (min(held_out), max(held_out)):
        axes.annotate(
            f"{held_out[step]:.3f}",
            (step, held_out[step]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="left" if step == min(held_out) else "right",
            color="#c2410c",
            weight="bold",
        )
    axes.set(xlabel=f"step ({tokens} tokens each)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
