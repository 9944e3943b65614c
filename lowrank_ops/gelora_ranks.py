"""From dimensions to ranks: the rule, the budget, and what was found in a table and a picture."""

import heapq
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["RankSelection", "block_ranks", "plot", "report", "within_budget"]

_MAX_RANK = 512


class RankSelection(dict[str, int]):
    """Module name -> rank, and what the ranks were chosen by.

    Attributes:
        blocks: names of the blocks, in order.
        dimensions: intrinsic dimension of the first block's input and of each block's output, one more than
            there are blocks.
        block_ranks: rank of each block.
        parameters: numbers in all adapters.
        points: examples that the dimensions were measured on.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        *,
        blocks: Sequence[str],
        dimensions: Sequence[float],
        block_ranks: Sequence[int],
        parameters: int,
        points: int,
    ) -> None:
        super().__init__(ranks)
        self.blocks, self.dimensions = tuple(blocks), tuple(dimensions)
        self.block_ranks, self.parameters, self.points = tuple(block_ranks), parameters, points


def block_ranks(dimensions: Sequence[float], offset: int = 1) -> list[int]:
    """Return ⌈max(d' - d, 0) + offset⌉ for each two neighbours d, d' of ``dimensions``, 512 at most."""
    return [min(_MAX_RANK, math.ceil(growth)) for growth in growths(dimensions, offset)]


def growths(dimensions: Sequence[float], offset: int) -> list[float]:
    """Return max(d' - d, 0) + offset for each two neighbours d, d' of ``dimensions``."""
    return [
        max(after - before, 0.0) + offset for before, after in zip(dimensions, dimensions[1:], strict=False)
    ]


def within_budget(shares: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Return ranks in proportion to ``shares``, at least 1, that cost ``budget`` or as little less as fits.

    One rank at a time goes to the block whose rank is furthest below its share, by Webster's method of
    dividing seats, and to none that it would take past the budget or 512.

    Args:
        shares: positive, one a block.
        costs: parameters of one rank in each block.
        budget: parameters in all, at least ``sum(costs)``.
    """
    ranks, left = [1] * len(shares), budget - sum(costs)
    # the index settles ties: the same ranks every time
    queue = [(-share / 1.5, index) for index, share in enumerate(shares)]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        if costs[index] <= left and ranks[index] < _MAX_RANK:
            ranks[index] += 1
            left -= costs[index]
            heapq.heappush(queue, (-shares[index] / (ranks[index] + 0.5), index))
    return ranks


def report(selection: RankSelection) -> str:
    """Return a table: dimension before and after each block, and its rank."""
    width = max(len("block"), *map(len, selection.blocks))
    lines = [f"{'block':<{width}}  {'d in':>7}  {'d out':>7}  rank"]
    for name, before, after, rank in zip(
        selection.blocks, selection.dimensions, selection.dimensions[1:], selection.block_ranks, strict=False
    ):
        lines.append(f"{name:<{width}}  {before:7.2f}  {after:7.2f}  {rank:4d}")
    lines.append(
        f"{selection.parameters:,} parameters in {len(selection)} matrices; {selection.points} points"
    )
    return "\n".join(lines)


def plot(selection: RankSelection, path: str | os.PathLike[str]) -> None:
    """Write a PNG with the dimension of every hidden state, and the rank of every block below it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "plot: matplotlib must be installed, got no such module; pip install matplotlib"
        ) from error
    path = Path(path)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    count = len(selection.blocks)
    # a block lies between the states before and after it
    above.plot([i - 0.5 for i in range(count + 1)], selection.dimensions, marker="o", color="#1d4ed8")
    above.set(ylabel="intrinsic dimension", title=f"TwoNN on {selection.points} points a hidden state")
    above.set_ylim(0, 1.15 * max(selection.dimensions))
    below.bar(range(count), selection.block_ranks, color="#c2410c")
    below.set(ylabel="rank", xlabel="block; its input is to its left, its output to its right")
    below.set_title(f"{selection.parameters:,} parameters")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
