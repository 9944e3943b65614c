"""Put the updates of a whole model into its weights, take them out again, or drop the adapters."""

from contextlib import ExitStack

from torch import nn

from .fused_linear import FusedLinear
from .inject import fused_layers, note_shared_weights, replace_modules, unwrapped

__all__ = ["eject", "merge", "unmerge"]


def merge(model: nn.Module) -> nn.Module:
    """Put the update of every fused layer into its base weight, in place. Merged layers are left alone.

    Returns:
        ``model`` itself; it computes what it did, to the rounding of one weight, at the price of the base.

    Raises:
        ValueError: the model has no fused layer, or a merged weight would not be finite; every layer is then
            as before.

    Memory: the original weights move to host memory until ``unmerge`` or ``eject``, N·K numbers a layer. A
        weight that another module shares stays where it is, and the layer gets its own.

    Note: ``eject`` before ``save_pretrained``. A merged model is still an injected one, whose ``state_dict``
        holds the unmerged weights, under names with "base" in them, and the adapters.
    """
    layers = _fused_layers("merge", model)
    note_shared_weights(unwrapped(model), [layer for layer in layers.values() if not layer.merged])
    with ExitStack() as undo:
        for name, layer in layers.items():
            if not layer.merged:
                layer.merge(name=f"weight of {name!r}")
                undo.callback(layer.unmerge)
        undo.pop_all()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weight of every fused layer back, bit for bit, in place.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no fused layer. Unmerged layers are left alone.
    """
    for layer in _fused_layers("unmerge", model).values():
        layer.unmerge()
    return model


def eject(model: nn.Module) -> nn.Module:
    """Drop every adapter, in place: plain ``nn.Linear`` modules again, which keep the update if merged.

    ``requires_grad`` stays as it is, so the base is still frozen; ``model.requires_grad_(True)`` trains it.

    Returns:
        ``model`` itself, or its base layer if the model is one fused layer.

    Raises:
        ValueError: the model has no fused layer.
    """
    layers = _fused_layers("eject", model)
    if isinstance(model, FusedLinear):
        return model.plain()
    replace_modules(model, {id(layer): layer.plain() for layer in layers.values()})
    return model


def _fused_layers(op: str, model: nn.Module) -> dict[str, FusedLinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    layers = fused_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"{op}: model must have fused layers, got a {kind} without; inject it first")
    return layers
