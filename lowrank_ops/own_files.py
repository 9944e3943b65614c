"""Files of the methods that PEFT lacks: config, and each layer's tensors, shared ones once."""

import json
from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import CONFIG, WEIGHTS, read_tensors, write_files
from .config import MethodConfig
from .fused_linear import FusedLinear
from .inject import check_uninjected, find_targets, fused_layers, install, set_trainable, unwrapped
from .layer_types import FILE_LAYERS
from .methods import METHODS

__all__ = ["is_own", "load_own", "read_own", "save_own"]

_VERSION = 1


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether these fields of adapter_config.json are of a method that PEFT lacks."""
    return "lowrank_ops_format" in fields


def config_of(op: str, layers: Mapping[str, FusedLinear]) -> MethodConfig:
    """Return the config that all layers share, or raise."""
    configs = {layer.config for layer in layers.values()}
    if len(configs) != 1:
        raise ValueError(f"{op}: fused layers must share one config, got {len(configs)} different ones")
    return configs.pop()


def save_own(
    op: str,
    model: nn.Module,
    layers: Mapping[str, FusedLinear],
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the files of ``layers``, floating tensors in ``dtype`` if there is one."""
    from safetensors.torch import save

    config = config_of(op, layers)
    # alive, since a tensor that a layer made for this could leave its address to the next
    tensors, shared, first, alive = {}, {}, {}, []
    for name, layer in layers.items():
        for key, tensor in layer.file_tensors().items():
            key = f"{name}.{key}"
            alive.append(tensor)
            if tensor.is_meta:
                raise ValueError(f"{op}: model must hold data, got {key} on meta")
            place = (tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else key
            if (owner := first.setdefault(place, key)) != key:
                shared[key] = owner
            else:
                kind = dtype if tensor.is_floating_point() else None
                tensors[key] = tensor.detach().to("cpu", kind).contiguous()
    fields = {
        "lowrank_ops_format": _VERSION,
        "peft_type": config.method.upper(),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        **{field.name: _written(getattr(config, field.name)) for field in fields_of(config)},
        "layers": list(layers),
        "shared": shared,
    }
    weights = save(tensors, metadata={"format": "pt"})
    write_files(op, folder, {WEIGHTS: weights, CONFIG: json.dumps(fields, indent=2).encode()})


def load_own(op: str, model: nn.Module, folder: Path, fields: Mapping[str, Any]) -> None:
    """Inject a plain model with what ``folder`` holds, or fill an injected one."""
    config, tensors = read_own(op, folder, fields)
    inner = unwrapped(model)
    layers = fused_layers(inner)
    if layers:
        _fill(op, layers, config, tensors)
        return
    check_uninjected(op, model)
    targets = find_targets(op, inner, config.target_modules)
    _check_layers(op, targets, tensors)
    devices = {linear.weight.device for linear in targets.values() if linear.weight.is_cuda}
    # tensors that are made in inference mode could never train
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        layers = FILE_LAYERS[config.method].build_for_file(config, targets, tensors)
        copies = [layer.prepare_load(op, name, tensors[name]) for name, layer in layers.items()]
        for copy in copies:
            copy()
    install(inner, {id(linear): layers[name] for name, linear in targets.items()})
    set_trainable(inner, layers.values())


def _fill(
    op: str,
    layers: Mapping[str, FusedLinear],
    config: MethodConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    own = config_of(op, layers)
    for field in fields_of(own):
        expected, actual = getattr(own, field.name), getattr(config, field.name, None)
        if type(own) is not type(config) or (
            field.name not in ("lora_dropout", "target_modules") and expected != actual
        ):
            raise ValueError(f"{op}: model must have the config of the files, {config}, got {own}")
    _check_layers(op, layers, tensors)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{op}: layer {name!r} must not be merged, got merged; unmerge the model first")
    copies = [layer.prepare_load(op, name, tensors[name]) for name, layer in layers.items()]
    for copy in copies:
        copy()


def read_own(
    op: str, folder: Path, fields: Mapping[str, Any]
) -> tuple[MethodConfig, dict[str, dict[str, Tensor]]]:
    """Return the config in the files of ``folder``, and the tensors of each layer by its name, or raise."""
    version, method = fields["lowrank_ops_format"], str(fields.get("peft_type")).lower()
    if version != _VERSION or method not in METHODS:
        raise NotImplementedError(
            f"{op}: files must be of format {_VERSION} and a method in {', '.join(METHODS)}, "
            f"got format {version!r} and {method!r}"
        )
    kind = METHODS[method].config_class
    given = {field.name: fields[field.name] for field in fields_of(kind) if field.name in fields}
    try:
        config = kind(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: options must be valid, got {error}") from error
    stored, shared, layers = read_tensors(op, folder), fields.get("shared", {}), fields.get("layers", [])
    for key, owner in shared.items():
        if owner not in stored:
            raise ValueError(f"{op}: {WEIGHTS} must hold {owner!r}, which {key!r} shares, got none")
        stored[key] = stored[owner]
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for key, tensor in stored.items():
        # a layer's name holds dots, and so may a tensor's: the longest name that fits
        owner = max((name for name in tensors if key.startswith(f"{name}.")), key=len, default=None)
        if owner is None:
            raise ValueError(f"{op}: {WEIGHTS} must hold tensors of the layers in {CONFIG}, got {key!r}")
        tensors[owner][key[len(owner) + 1 :]] = tensor
    METHODS[method].check_file(op, config, tensors)
    return config, tensors


def _check_layers(op: str, expected: Mapping[str, nn.Module], actual: Mapping[str, object]) -> None:
    for kind, names in (
        ("lacks", expected.keys() - actual.keys()),
        ("adds", actual.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{op}: adapter must fit the model, got layers where it {kind} {min(names)!r}{more}"
            )


def _written(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
