"""From dense factors with zeros to what is left of them, in place, the optimizer included."""

import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .config import LoRAConfig
from .fused_linear import FusedLinear, check_unhooked
from .inject import check_model, fused_layers, replace_modules, unwrapped
from .layer_salor import CompactSALOR, FusedSALORLinear
from .methods.lora import LoRA
from .methods.salor import SALOR
from .salor_config import SALORConfig
from .sparse_factor import SparseFactor
from .sparse_mask import SparseMask

__all__ = ["compact", "dense_layers"]

_OP = "compact"
# the new parameter for an old one, and what makes of a tensor of the old shape one of the new
_Moved = dict[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]


@torch.inference_mode(False)
@torch.no_grad()
def compact(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Keep of every SALOR layer what is not pruned, in place; the model computes what it did.

    With structure="rank" what is left is a plain LoRA of smaller ranks: the layers stay the objects they
    are, with a ``LoRAConfig`` that has a ``rank_pattern``, and ``save_adapter`` writes PEFT's files. With the
    others each layer becomes a ``FusedMaskedLoRALinear`` whose parameters are the vectors of the values left.

    Args:
        model: injected with a ``SALORConfig``, unmerged. On "meta", the final sparsities are taken, the same
            in every layer: for planning. In DistributedDataParallel it must be wrapped anew to train on.
        optimizer: what holds the adapters and goes on with the new parameters: of its states, those of an
            entry each are packed as the entries are.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a layer is merged, has hooks, or is compact already, or the optimizer does not hold the
            adapters. The model is then as before.
    """
    layers = dense_layers(_OP, model)
    if "" in layers:
        raise ValueError(f"{_OP}: model must contain the layers, got a bare {type(model).__name__}")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{_OP}: layer {name!r} must not be merged, got merged; unmerge the model first")
        check_unhooked(_OP, f"layer {name!r}", layer)
    if optimizer is not None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if missing := [n for n, m in layers.items() if not held.issuperset(m.adapter.parameters())]:
            raise ValueError(
                f"{_OP}: optimizer must hold the adapters, got one without that of {missing[0]!r}"
            )
    config = next(iter(layers.values())).config
    moved = _to_lora(layers) if config.structure == "rank" else _to_masked(unwrapped(model), layers)
    if optimizer is not None:
        _move_states(optimizer, moved)
    return model


def dense_layers(op: str, model: object) -> dict[str, FusedLinear]:
    """Return the fused layers of ``model``, all of them SALOR's with dense factors, or raise."""
    check_model(op, model)
    layers = fused_layers(unwrapped(model))
    for name, layer in layers.items():
        if not isinstance(layer.adapter, SALOR):
            kind = type(layer.adapter).__name__
            raise ValueError(f"{op}: layer {name!r} must have dense SALOR factors, got {kind}")
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"{op}: model must have fused layers, got a {kind} without; inject it first")
    return layers


def _to_lora(layers: Mapping[str, FusedLinear]) -> _Moved:
    moved: _Moved = {}
    factors = {}
    for name, layer in layers.items():
        adapter, rank = layer.adapter, layer.adapter.rank
        if adapter.a.is_meta:
            kept = torch.arange(max(1, rank - round(layer.config.sparsity_a * rank)), device="meta")
        else:
            kept = (~adapter.a_pruned).any(dim=1).nonzero().squeeze(1)
        picks = (_picker(0, kept), _picker(1, kept))
        factors[name] = [
            _renewed(old, pick, moved) for (old, _), pick in zip(adapter.pairs(), picks, strict=True)
        ]
    config = _lora_config(
        next(iter(layers.values())).config, {n: a.shape[0] for n, (a, _) in factors.items()}
    )
    for name, layer in layers.items():
        training = layer.adapter.training
        layer.adapter = LoRA.from_factors(config.for_layer(name), *factors[name]).train(training)
        layer.config = config
    return moved


def _lora_config(config: SALORConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    r = Counter(ranks.values()).most_common(1)[0][0]
    own = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r,
        config.scale * r,
        config.lora_dropout,
        config.target_modules,
        rank_pattern=own,
        alpha_pattern={name: config.scale * rank for name, rank in own.items()},
    )


def _to_masked(model: nn.Module, layers: Mapping[str, FusedLinear]) -> _Moved:
    moved: _Moved = {}
    replacements = {}
    for layer in layers.values():
        factors = []
        for (old, pruned), sparsity in zip(
            layer.adapter.pairs(), (layer.config.sparsity_a, layer.config.sparsity_b), strict=True
        ):
            if old.is_meta:
                mask = SparseMask.meta(old.shape, old.numel() - round(sparsity * old.numel()))
                factor = SparseFactor(mask, old.new_empty(mask.nnz))
            else:
                mask = SparseMask.from_dense(~pruned)
                factor = SparseFactor(mask, mask.pack(old))
            factor.values.requires_grad_(old.requires_grad)
            moved[old] = factor.values, mask.pack
            factors.append(factor)
        adapter = CompactSALOR(layer.config, layer.weight, *factors)
        new = FusedSALORLinear(layer.base, adapter, layer.config).train(layer.training)
        for option in ("dropout_p", "impl", "shares_weight", "peft_fields"):
            setattr(new, option, getattr(layer, option))
        replacements[id(layer)] = new
    replace_modules(model, replacements)
    return moved


def _picker(dim: int, kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(dim, kept)


def _renewed(old: nn.Parameter, pick: Callable[[Tensor], Tensor], moved: _Moved) -> nn.Parameter:
    moved[old] = nn.Parameter(pick(old.detach()), requires_grad=old.requires_grad), pick
    return moved[old][0]


def _move_states(optimizer: torch.optim.Optimizer, moved: _Moved) -> None:
    for group in optimizer.param_groups:
        group["params"] = [moved[old][0] if old in moved else old for old in group["params"]]
    for old, (new, pick) in moved.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {
                key: pick(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in state.items()
            }
