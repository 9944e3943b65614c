"""What the tables of all cases are made with."""

from collections.abc import Iterable, Sequence

__all__ = ["NONE", "markdown", "number"]

NONE = "–"


def number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    return NONE if value is None else f"{value * factor:.{digits}f}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
