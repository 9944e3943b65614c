"""GeLoRA: the rank of every block's adapters from the intrinsic dimension of the hidden states around it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .functional import nearest_neighbors
from .gelora_config import GeLoRAConfig, check_discard
from .gelora_ranks import RankSelection, block_ranks, growths, plot, report, within_budget
from .gelora_states import pooled_states
from .inject import check_model, check_uninjected, find_targets, named_modules, unwrapped

__all__ = ["RankSelection", "block_ranks", "intrinsic_dimension", "plot", "report", "select_ranks"]


def intrinsic_dimension(points: Tensor, estimator: str = "fit", discard: float = 0.1) -> float:
    """Return the TwoNN estimate of the dimension of the manifold that ``points`` lie on.

    Needs no more of the points than μ, the distance of each to its second nearest neighbour over that to its
    nearest: on a manifold of dimension d, P(μ > t) = t⁻ᵈ. On a GPU the neighbours come from a Triton kernel
    that never forms the matrix of distances; near-duplicates are exact. Exact duplicates count once.

    Args:
        points: (M, K), one vector a point, floating, finite, any device. At least 3 distinct ones; thousands
            for an estimate within a few per cent. High dimensions are known to be underestimated.
        estimator: "fit", the line through the origin of -log(1 - i/M) over the i-th smallest log μ, as in
            DADApy, or "mle", M / Σ log μ of all points.
        discard: share in [0, 1) of the largest μ that "fit" leaves out.

    Returns:
        The dimension, positive.

    Raises:
        ValueError: too few distinct points, equal distances throughout, or a value out of range.
        TypeError: points are no floating tensor.

    Memory: 2 M·K bytes on a GPU; on a CPU blocks of 2²⁴ distances.
    Source: Facco et al. 2017 (doi:10.1038/s41598-017-11873-y), equations 3 to 5.
    """
    op = "intrinsic_dimension"
    if estimator not in ("fit", "mle"):
        raise ValueError(f'{op}: estimator must be "fit" or "mle", got {estimator!r}')
    check_discard(op, discard)
    _check_points(op, points)
    points = points.detach()
    first, second = nearest_neighbors(points)
    if (first == 0).any():
        given, points = len(points), _distinct(points, first == 0)
        if len(points) < 3:
            raise ValueError(
                f"{op}: points must hold at least 3 distinct ones, got {len(points)} among {given}"
            )
        first, second = nearest_neighbors(points)
    ratios = second.double() / first.double()
    if not ratios.isfinite().all():
        raise ValueError(f"{op}: points must be distances apart that float32 holds, got {float(first.min())}")
    return _dimension(ratios, estimator, discard)


def _check_points(op: str, points: object) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{op}: points must be a Tensor, got {type(points).__name__}")
    if not points.is_floating_point() or points.dtype.itemsize < 2:
        raise TypeError(f"{op}: points must be float16, bfloat16, float32 or float64, got {points.dtype}")
    if points.dim() != 2:
        raise ValueError(f"{op}: points must be (M, K), got {tuple(points.shape)}")
    if len(points) < 3 or points.shape[1] < 1:
        raise ValueError(f"{op}: points must be (M, K) with M >= 3 and K >= 1, got {tuple(points.shape)}")
    if not points.isfinite().all():
        raise ValueError(f"{op}: points must be finite, got infinity or NaN among them")


def _distinct(points: Tensor, repeated: Tensor) -> Tensor:
    """Return ``points`` with one of each set of equal ones; ``repeated``, (M,) bool, marks all in a set."""
    rows = repeated.nonzero().flatten()
    _, sets = torch.unique(points[rows], dim=0, return_inverse=True)
    first = rows.new_full((int(sets.max()) + 1,), len(points)).scatter_reduce(0, sets, rows, "amin")
    keep = ~repeated
    keep[first] = True
    return points[keep]


def _dimension(ratios: Tensor, estimator: str, discard: float) -> float:
    """Return the dimension that ratios (M,) of second to first distances speak of."""
    M = len(ratios)
    log_ratios = ratios.double().log().sort().values
    if estimator == "mle":
        total, weight = log_ratios.sum().item(), float(M)
    else:
        # the last point would be at -log 0
        count = min(max(int((1 - discard) * M + 1e-9), 1), M - 1)
        x = log_ratios[:count]
        y = -torch.log1p(-torch.arange(1, count + 1, device=x.device, dtype=x.dtype) / M)
        total, weight = (x @ x).item(), (x @ y).item()
    if not total > 0:
        raise ValueError(
            "intrinsic_dimension: points must have second neighbours farther than first ones, got none"
        )
    return weight / total


def select_ranks(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    config: GeLoRAConfig,
    *,
    progress: bool = False,
) -> RankSelection:
    """Measure the intrinsic dimension around every block of a pretrained model and return a rank a matrix.

    Use it before ``inject``, on the data of the task::

        ranks = lo.gelora.select_ranks(model, batches, config)
        lo.inject(model, config.lora_config(ranks))

    States are the raw outputs of the blocks, so that of the last block is taken before a final norm.

    Args:
        model: the pretrained model, without adapters. It runs in evaluation mode, without its output head
            where it has a ``base_model``, and is left as it was.
        batches: what the model takes, token ids (B, T) or a dict with them and an attention_mask (B, T);
            taken one by one until ``config.max_points`` examples are in. An example is one point.
        config: the options.
        progress: whether to show a progress bar.

    Returns:
        Module name -> rank, with the dimensions beside it: see :class:`RankSelection`; ``gelora.report`` and
        ``gelora.plot`` show it.

    Raises:
        ValueError: the targets do not lie in one list of blocks, the budget is below rank 1 everywhere,
            there are too few examples, or hidden states are not (B, T, K).
        TypeError: an argument has the wrong type.

    Memory: examples · K · 4 bytes for each block, on the CPU.
    Source: GeLoRA (arXiv:2412.09250).
    """
    op = "select_ranks"
    check_model(op, model)
    if not isinstance(config, GeLoRAConfig):
        raise TypeError(f"{op}: config must be a GeLoRAConfig, got {type(config).__name__}")
    check_uninjected(op, model)
    model = unwrapped(model)
    targets = find_targets(op, model, config.target_modules)
    path, blocks, owners = _owners(op, model, list(targets), config.blocks)
    costs = [0] * len(blocks)
    for name, linear in targets.items():
        costs[owners[name]] += linear.in_features + linear.out_features
    if config.budget is not None and config.budget < sum(costs):
        raise ValueError(
            f"{op}: budget must be at least {sum(costs)}, which rank 1 everywhere takes, got {config.budget}"
        )
    device = next(model.parameters()).device
    states = pooled_states(model, blocks, batches, config.pooling, config.max_points, progress)
    dimensions = [intrinsic_dimension(one.to(device), config.estimator, config.discard) for one in states]
    ranks = _ranks(dimensions, costs, config)
    return RankSelection(
        {name: ranks[owners[name]] for name in targets},
        blocks=[f"{path}.{index}" for index in range(len(blocks))],
        dimensions=dimensions,
        block_ranks=ranks,
        parameters=sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)),
        points=len(states[0]),
    )


def _ranks(dimensions: list[float], costs: list[int], config: GeLoRAConfig) -> list[int]:
    if config.budget is None:
        return block_ranks(dimensions, config.offset)
    return within_budget(growths(dimensions, config.offset), costs, config.budget)


def _owners(
    op: str, model: nn.Module, targets: list[str], blocks: str | None
) -> tuple[str, nn.ModuleList, dict[str, int]]:
    """Return the name of the list of blocks, the list, and for each target the number of its block."""
    lists = {name: module for name, module in named_modules(model) if isinstance(module, nn.ModuleList)}
    if blocks is not None and blocks not in lists:
        known = ", ".join(lists) or "none"
        raise ValueError(f"{op}: blocks must name an nn.ModuleList of the model, {known}, got {blocks!r}")
    # outer modules come before what is inside them
    for path in lists if blocks is None else [blocks]:
        if all(name.startswith(f"{path}.") for name in targets):
            owners = {name: int(name[len(path) + 1 :].partition(".")[0]) for name in targets}
            return path, lists[path], owners
    places = [blocks] if blocks else list(lists)
    astray = next((n for n in targets if not any(n.startswith(f"{p}.") for p in places)), targets[0])
    where = " or ".join(places) or "none here"
    raise ValueError(f"{op}: target_modules must lie in one list of blocks, {where}, got {astray!r}")
