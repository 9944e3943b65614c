"""SALR on a whole model: prune and compress its base once, and the paper's learning rate for the residual."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import folder_path
from .fused_linear import check_config
from .inject import (
    check_model,
    check_uninjected,
    find_targets,
    fused_layers,
    generators_kept_on_failure,
    install,
    set_trainable,
    unwrapped,
)
from .layer_pruned import FusedPrunedLinear, Pruned, make_layer, model_cuts, prune_linear
from .salr_checkpoint import layer_key, read_layer, write_layer
from .salr_config import SALRConfig
from .salr_pruning import Cut

__all__ = ["parameter_groups", "prune", "residual_learning_rate"]

_BLOCK = 8  # vectors that the power iteration moves at once
_NEGLIGIBLE = 1e-5  # of a product, what is taken for its rounding


def prune(
    model: nn.Module,
    config: SALRConfig,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Prune and compress every linear layer that ``config`` targets, in place, and put adapters beside it.

    Layer by layer, in float32, or float64 for float64: what has the least magnitude is dropped, the exact
    share of it, the first of equals; the residual of what was dropped is decomposed, and the rest compressed.
    Then as after ``inject``: only the adapters train, and ``lo.save_adapter``, ``lo.merge`` and ``lo.report``
    know the layers. ``inject`` with the same config gives the same model, without files and bar, and keeps
    all dense and compressed weights in their places until the end.

    Args:
        model: a model that contains ``nn.Linear`` layers, on any devices. On "meta" it is planned: sizes and
            counts are those of the pruned model, with scope "global" as if every layer lost the same share.
        config: the options.
        folder: gets one file a layer, when that is done; made if it does not exist. A later call with the
            same model and config takes from there what is done.
        progress: show a bar (tqdm).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: as ``inject``; a weight is not finite; the folder holds another model's layers.
        TypeError: as ``inject``. RuntimeError: tqdm is not installed. OSError: the folder cannot be written.
        The model is then as before, and so it is after an interruption.

    Memory: of work, some 30 bytes for each of the N·K entries of one layer. Of a model on a GPU each layer's
    weight moves to host memory when its compressed form is made, until all are done, so that what stopped
    can be undone: GPU memory only falls, beside that work. Weights on a CPU stay where they are.
    Source: SALR (arXiv:2601.16991).
    """
    op = "prune"
    check_model(op, model)
    check_config(op, config, ("salr",))
    folder = None if folder is None else folder_path(op, folder)
    check_uninjected(op, model)
    inner = unwrapped(model)
    targets = find_targets(op, inner, config.target_modules)
    devices = {linear.weight.device for linear in targets.values()}
    # tensors that are made in inference mode could never train
    with torch.inference_mode(False), torch.no_grad(), generators_kept_on_failure(devices):
        with _bar(targets, progress) as names, ExitStack() as undo:
            layers = _prune_all(op, inner, targets, config, folder, names, undo)
            undo.pop_all()
    install(inner, {id(linear): layers[name] for name, linear in targets.items()})
    set_trainable(inner, layers.values())
    return model


def _prune_all(
    op: str,
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    config: SALRConfig,
    folder: Path | None,
    names: Iterable[str],
    undo: ExitStack,
) -> dict[str, FusedPrunedLinear]:
    holders = Counter(id(p) for m in model.modules() for p in set(m.parameters(recurse=False)))
    layers, cuts = {}, model_cuts(op, config, targets)
    for name in names:
        linear = targets[name]
        if folder is None or linear.weight.is_meta:
            pruned = prune_linear(op, name, linear, config, cuts.get(name))
        else:
            pruned = _prune_or_read(op, name, linear, config, folder, cuts)
        layers[name] = make_layer(linear, config, pruned)
        if linear.weight.is_cuda and holders[id(linear.weight)] == 1:
            undo.callback(_restore, linear.weight, linear.weight.device)
            linear.weight.data = linear.weight.data.cpu()
    return layers


def _prune_or_read(
    op: str, name: str, linear: nn.Linear, config: SALRConfig, folder: Path, cuts: Mapping[str, Cut]
) -> Pruned:
    key = layer_key(linear, config, cuts.get(name))
    pruned = read_layer(op, folder, name, key, linear, config)
    if pruned is None:
        pruned = prune_linear(op, name, linear, config, cuts.get(name))
        write_layer(op, folder, name, key, pruned)
    return pruned


def _restore(weight: nn.Parameter, device: torch.device) -> None:
    weight.data = weight.data.to(device)


@contextmanager
def _bar(targets: Mapping[str, nn.Linear], progress: bool) -> Iterator[Iterable[str]]:
    if not progress:
        yield targets
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError(
            "prune: progress must be False where tqdm is not installed, got True; pip install tqdm"
        ) from error
    with tqdm(targets, desc="pruning", unit="layer") as bar:
        yield bar


def residual_learning_rate(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], *, passes: int = 8
) -> dict[str, float]:
    """Return 1 / σ_max(X)² of each pruned layer, X (M, K) its inputs over all batches: the paper's rate.

    It is the rate 1 / L of plain gradient descent on ½ ‖X ΔWᵀ - Y‖² as a function of ΔW: a rule for the
    product of the residual's factors and a summed loss, not for AdamW, and an upper one for the factors. For
    a loss that is a mean over tokens multiply it by their number. How the paper's authors applied it is not
    public; ``parameter_groups`` makes it the rate of an SGD group.

    Args:
        model: holds pruned layers; runs in evaluation mode, and is left as it was.
        batches: tensors, which the model takes as its first argument, or dicts of arguments; kept, and run
            ``passes`` times each.
        passes: at least 1, of a power iteration on eight vectors that keeps all it has seen. σ_max² is
            approached from below: eight passes come to 2 % even where X is white noise.

    Returns:
        rate by layer name, positive; infinite for a layer whose inputs were all zero.

    Raises:
        ValueError: no pruned layers, no batches, or ``passes`` is out of range.
    """
    op = "residual_learning_rate"
    check_model(op, model)
    layers = _pruned_layers(op, model)
    if isinstance(passes, bool) or not isinstance(passes, int):
        raise TypeError(f"{op}: passes must be an int, got {type(passes).__name__}")
    if passes < 1:
        raise ValueError(f"{op}: passes must be at least 1, got {passes}")
    batches = list(batches)
    if not batches:
        raise ValueError(f"{op}: batches must hold calibration data, got none")
    generator = torch.Generator().manual_seed(0)
    spaces = {}
    for name, layer in layers.items():
        start = torch.randn(layer.in_features, min(_BLOCK, layer.in_features), generator=generator)
        spaces[name] = _Krylov(start.to(layer.base.origin.device))
    for _ in range(passes):
        if not (growing := {name: space.newest for name, space in spaces.items() if not space.is_full}):
            break
        for name, product in _gram_products(model, layers, growing, batches).items():
            spaces[name].add(product)
    squares = {name: space.largest() for name, space in spaces.items()}
    return {name: 1 / square if square > 0 else float("inf") for name, square in squares.items()}


class _Krylov:
    """Block Lanczos with full orthogonalisation: a basis, (K, columns), and XᵀX times it."""

    def __init__(self, start: Tensor) -> None:
        self.newest = torch.linalg.qr(start).Q
        self.bases: list[Tensor] = []
        self.products: list[Tensor] = []

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another block, or nothing new in it."""
        K, width = self.newest.shape
        return not width or sum(basis.shape[1] for basis in self.bases) + width > K

    def add(self, product: Tensor) -> None:
        """Take XᵀX ``newest``."""
        self.bases.append(self.newest)
        self.products.append(product)
        basis = torch.cat(self.bases, 1)
        floor = _NEGLIGIBLE * torch.linalg.matrix_norm(product)
        rest, sizes, _ = torch.linalg.svd(product - basis @ (basis.T @ product), full_matrices=False)
        # directions of rounding alone, as of inputs of low rank, may lie in the basis; the others are made
        # orthogonal once more, since what is left of a small rest is not so to rounding
        rest = rest[:, sizes > floor]
        self.newest = torch.linalg.qr(rest - basis @ (basis.T @ rest)).Q

    def largest(self) -> float:
        """Return the largest Ritz value, at most the largest eigenvalue of XᵀX."""
        small = torch.cat(self.bases, 1).T @ torch.cat(self.products, 1)
        return torch.linalg.eigvalsh((small + small.T) / 2)[-1].item()


def _gram_products(
    model: nn.Module,
    layers: Mapping[str, FusedPrunedLinear],
    blocks: Mapping[str, Tensor],
    batches: list[Tensor | Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Return XᵀX V of every layer, (K, columns of V), in float32, summed over the batches."""
    sums = {name: torch.zeros_like(block) for name, block in blocks.items()}

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            sums[name] += x.T @ (x @ blocks[name])

        return hook

    modes = {module: module.training for module in model.modules()}
    with ExitStack() as undo, torch.no_grad():
        for name in blocks:
            layer = layers[name]
            undo.callback(layer.register_forward_pre_hook(hook_of(name)).remove)
        for module, mode in modes.items():
            undo.callback(setattr, module, "training", mode)
        model.eval()
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    return sums


def parameter_groups(
    model: nn.Module, lr: float, residual_rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return groups for an optimizer: all LoRA factors at ``lr``, each layer's residual at its own rate.

    Args:
        model: pruned with ``separate_residual``.
        lr: of the LoRA factors, and of every residual without ``residual_rates``.
        residual_rates: layer name -> rate, as ``residual_learning_rate`` returns it; infinite ones
            become ``lr``.

    Returns:
        the groups: "params", "lr" and "name", "lora" or that of a layer.

    Raises:
        ValueError: no pruned layers, a residual that shares the LoRA pair's parameters, or a rate is missing.
    """
    op = "parameter_groups"
    check_model(op, model)
    layers = _pruned_layers(op, model)
    groups = [{"params": [], "lr": lr, "name": "lora"}]
    for name, layer in layers.items():
        adapter = layer.adapter
        if adapter.joined:
            raise ValueError(
                f"{op}: model must have residuals in parameters of their own, got a joined one at {name!r}; "
                "prune with separate_residual=True"
            )
        groups[0]["params"] += [adapter.a, adapter.b]
        rate = lr if residual_rates is None else residual_rates.get(name)
        if rate is None:
            raise ValueError(f"{op}: residual_rates must name every pruned layer, got none for {name!r}")
        if adapter.residual_a.requires_grad:
            pair = [adapter.residual_a, adapter.residual_b]
            groups.append({"params": pair, "lr": rate if rate < float("inf") else lr, "name": name})
    return groups


def _pruned_layers(op: str, model: nn.Module) -> dict[str, FusedPrunedLinear]:
    found = {
        name: layer
        for name, layer in fused_layers(unwrapped(model)).items()
        if isinstance(layer, FusedPrunedLinear)
    }
    if not found:
        raise ValueError(f"{op}: model must have pruned layers, got none; salr.prune makes them")
    return found
