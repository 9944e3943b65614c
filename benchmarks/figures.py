"""What the figures of all cases share."""

import os
from pathlib import Path

from .env import header

__all__ = ["COLOURS", "MARKERS", "save", "source"]

# Okabe and Ito's colours, which the colour-blind can tell apart; the marker says the same again
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def source(data: dict) -> str:
    """Return the device and the day of a results file."""
    environment = data["environment"]
    return f"{environment['gpu'] or header(environment).split(',')[0]}, {environment['date']}"


def save(figure, path: Path) -> None:
    """Write a figure as a PNG, under a temporary name that is renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=160, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
