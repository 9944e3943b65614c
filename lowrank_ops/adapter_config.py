"""PEFT's adapter_config.json: our options to its fields and back."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any
from warnings import warn

from torch import nn

from .config import LoRAConfig, selects
from .layers import FusedLoRALinear

__all__ = ["config_from_fields", "config_of_layers", "fields_from_config"]

# fields that say where an adapter comes from; they are kept and written again
_KEPT = ("base_model_name_or_path", "revision", "task_type")
# fields that change nothing about an adapter that is already trained
_NEUTRAL = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "runtime_config",
)  # fmt: skip
# fields that change what an adapter computes; each is refused unless it is off
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "megatron_config", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
# PEFT's defaults, which are not ours, for fields that a file may lack
_DEFAULTS = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
    "rank_pattern": {}, "alpha_pattern": {}, "bias": "none",
}  # fmt: skip
_NUMBERS = ("r", "lora_alpha", "lora_dropout")
# initialisations that leave the base weight alone
_PLAIN_INITS = (None, True, False, "true", "gaussian", "eva", "orthogonal")


def config_from_fields(
    op: str, fields: Mapping[str, Any], names: Collection[str]
) -> tuple[LoRAConfig, dict[str, Any], bool]:
    """Return the config that PEFT's ``fields`` describe, the fields to keep, and whether targets are exact.

    Args:
        op: what the errors call the caller.
        fields: the contents of adapter_config.json.
        names: the layers that the adapter has, which stand for the targets where a field narrows those.

    Raises:
        NotImplementedError: the adapter is of another kind, or has an option that changes what it computes.
        ValueError, TypeError: an option has no valid value.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise NotImplementedError(f'{op}: peft_type must be "LORA", got {kind!r}; load it with PEFT')
    for name in _REFUSED:
        if fields.get(name):
            raise NotImplementedError(f"{op}: {name} must be off, got {fields[name]!r}; load it with PEFT")
    start = fields.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_INITS:
        raise NotImplementedError(
            f"{op}: init_lora_weights must leave the base weight alone, got {start!r}; convert it with PEFT"
        )
    unknown = sorted(k for k in fields if fields[k] and k not in {*_KEPT, *_NEUTRAL, *_REFUSED, *_DEFAULTS})
    unknown = [name for name in unknown if name != "target_modules"]
    if unknown:
        warn(f"{op}: options {', '.join(unknown)} are not known here and are ignored", stacklevel=4)
    targets = fields.get("target_modules")
    exact = bool(targets) and not fields.get("exclude_modules") and fields.get("layers_to_transform") is None
    # null is no number; elsewhere it stands for the default
    given = {k: fields[k] for k in _DEFAULTS if k in fields and (k in _NUMBERS or fields[k] is not None)}
    try:
        config = LoRAConfig(target_modules=targets if exact else tuple(names), **{**_DEFAULTS, **given})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: options must be valid, got {error}") from error
    return config, {name: fields[name] for name in _KEPT if fields.get(name) is not None}, exact


def config_of_layers(op: str, layers: Mapping[str, FusedLoRALinear]) -> LoRAConfig:
    """Return the config that describes ``layers``; ranks and scales of their own become patterns.

    Raises:
        ValueError: the layers have different configs. NotImplementedError: PEFT does not have the method.
    """
    configs = {layer.config for layer in layers.values()}
    if len(configs) != 1:
        raise ValueError(f"{op}: fused layers must share one config, got {len(configs)} different ones")
    (config,) = configs
    if config.method != "lora":
        raise NotImplementedError(f'{op}: method must be "lora", which PEFT knows, got {config.method!r}')
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        own, adapter = config.for_layer(name), layer.adapter
        exact_name = f"^{re.escape(name)}"
        if own.r != adapter.rank:
            ranks[exact_name] = adapter.rank
        if replace(own, r=adapter.rank).scale != adapter.scale:
            alphas[exact_name] = adapter.scale * (adapter.rank**0.5 if config.use_rslora else adapter.rank)
    # the first entry that matches wins, so the exact ones come first
    ranks, alphas = {**ranks, **config.rank_pattern}, {**alphas, **config.alpha_pattern}
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def fields_from_config(
    config: LoRAConfig, model: nn.Module, layers: Mapping[str, FusedLoRALinear], names: Collection[str]
) -> dict[str, Any]:
    """Return the fields of adapter_config.json.

    Args:
        config: what describes ``layers``.
        model: the model that holds them; its name and class are recorded.
        layers: the fused layers by name.
        names: the names of all modules of the base model.
    """
    kept = next(iter(layers.values())).peft_fields
    model_class = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "revision": None,
        "task_type": None,
        **kept,
        "auto_mapping": None if kept.get("task_type") else model_class,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _written_targets(config.target_modules, list(layers), names),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "use_dora": False,
    }


def _written_targets(
    targets: str | Collection[str], layers: list[str], names: Collection[str]
) -> str | list[str]:
    """Return targets that select just ``layers`` among ``names`` by PEFT's rule: the given, if they do."""
    # PEFT's all-linear takes subclasses of nn.Linear too, so the names are spelled out, as PEFT itself does
    choices = [layers] if targets == "all-linear" else [targets, layers]
    for choice in choices:
        if {name for name in names if selects(choice, name)} == set(layers):
            return choice if isinstance(choice, str) else list(choice)
    return "|".join(re.escape(name) for name in layers)
