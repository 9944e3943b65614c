"""From a PEFT model to fused layers, in place, with the same numbers."""

from typing import TYPE_CHECKING

from torch import nn

from .adapter_config import config_from_fields
from .config import LoRAConfig
from .fused_linear import check_linear, check_unhooked
from .inject import check_called, install, named_modules
from .layers import FusedLoRALinear
from .methods.base import adapter_dtype
from .methods.lora import LoRA

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear as PeftLinear

__all__ = ["from_peft"]


def from_peft(peft_model: "PeftModel") -> nn.Module:
    """Swap the LoRA layers of a PEFT model for fused ones, in place, and return the model that PEFT wrapped.

    Adapter parameters are taken over, not copied: an optimizer that holds them stays valid. What trains, what
    is frozen, dropout, scales and dtypes stay as they are. The active adapter is taken; others are dropped.
    The PEFT wrapper is of no use afterwards.

    Args:
        peft_model: a ``PeftModel`` with one active LoRA adapter, unmerged, on plain ``nn.Linear`` layers.

    Returns:
        The base model, with ``FusedLoRALinear`` layers; ``save_adapter`` writes what PEFT would.

    Raises:
        TypeError: not a ``PeftModel``, or a layer or dtype that fused layers do not have.
        ValueError: merged or disabled layers, or not exactly one active adapter.
        NotImplementedError: DoRA or another option that changes what the adapter computes.
            The model is then as before.
    """
    from peft import PeftModel
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    op = "from_peft"
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"{op}: peft_model must be a PeftModel, got {type(peft_model).__name__}")
    active = peft_model.active_adapters
    if len(active) != 1:
        raise ValueError(f"{op}: peft_model must have one active adapter, got {len(active)}: {active}")
    (adapter,) = active
    model = peft_model.get_base_model()
    found = {name: module for name, module in named_modules(model) if isinstance(module, BaseTunerLayer)}
    for name, layer in found.items():
        if type(layer) is not PeftLinear:
            raise TypeError(f"{op}: layer {name!r} must be PEFT's lora.Linear, got {type(layer).__name__}")
        _check_layer(op, name, layer, adapter)
    check_called(op, model, found)
    adapted = {name: layer for name, layer in found.items() if adapter in layer.lora_A}
    config, kept, _ = config_from_fields(op, peft_model.peft_config[adapter].to_dict(), sorted(adapted))
    replacements: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in found.values()}
    for name, layer in adapted.items():
        fused = _fused(name, layer, adapter, config)
        fused.peft_fields = kept
        replacements[id(layer)] = fused
    install(model, replacements)
    # PEFT leaves its config on the model that it wraps, and would take it for its own again
    vars(model).pop("peft_config", None)
    return model


def _fused(name: str, layer: "PeftLinear", adapter: str, config: LoRAConfig) -> FusedLoRALinear:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    lora = LoRA.from_factors(config.for_layer(name), a, b)
    # set_scale and its like change these behind the config's back
    lora.rank, lora.scale = layer.r[adapter], layer.scaling[adapter]
    fused = FusedLoRALinear(layer.base_layer, lora, config)
    fused.dropout_p = getattr(layer.lora_dropout[adapter], "p", 0.0)
    return fused.train(layer.training)


def _check_layer(op: str, name: str, layer: "PeftLinear", adapter: str) -> None:
    if layer.merged:
        raise ValueError(f"{op}: layer {name!r} must not be merged, got merged; unmerge_adapter first")
    if layer.disable_adapters:
        raise ValueError(f"{op}: layer {name!r} must be enabled, got disabled; enable_adapter_layers first")
    check_linear(op, f"base of layer {name!r}", layer.base_layer)
    check_unhooked(op, f"layer {name!r}", layer)
    if adapter not in layer.lora_A:
        return
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        kind = type(layer.lora_variant[adapter]).__name__ if adapter in layer.lora_variant else "lora_bias"
        raise NotImplementedError(f"{op}: layer {name!r} must be plain LoRA, got {kind}; keep it in PEFT")
    base = layer.base_layer.weight.dtype
    for letter, factors in (("A", layer.lora_A), ("B", layer.lora_B)):
        actual = factors[adapter].weight.dtype
        if actual not in (base, adapter_dtype(base)):
            expected = " or ".join(str(dtype) for dtype in dict.fromkeys((base, adapter_dtype(base))))
            raise TypeError(f"{op}: lora_{letter} of {name!r} must be {expected}, got {actual}")
