"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
import pickle
import re
import struct
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_config import config_from_fields, config_of_layers, fields_from_config
from .config import LoRAConfig, selects
from .inject import (
    check_called,
    check_model,
    check_uninjected,
    fused_layers,
    install,
    named_modules,
    output_embedding,
    set_trainable,
)
from .layers import FusedLoRALinear, check_linear
from .methods.base import adapter_dtype
from .methods.lora import LoRA

__all__ = ["load_adapter", "save_adapter"]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_BIAS = re.compile(r"base_model\.model\.((?:.+\.)?)(?:base_layer\.)?bias")


@dataclass(frozen=True)
class _Stored:
    """One adapter as read: factors by layer name, biases by parameter name, and how to understand them."""

    config: LoRAConfig
    peft_fields: dict[str, Any]
    exact: bool
    factors: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` to ``folder``, as PEFT does: ``PeftModel.from_pretrained`` reads them.

    Both files are written under temporary names and then renamed, so that neither is ever half written.
    Tensors keep their dtype. A merged model saves the same files.

    Args:
        model: an injected model.
        folder: made if it does not exist; files of an earlier adapter in it are replaced.

    Raises:
        ValueError: the model has no fused layers, or they hold no data ("meta"), or share no config, or
            ``folder`` is a file. NotImplementedError: PEFT does not have the method.
    """
    from safetensors.torch import save

    op = "save_adapter"
    check_model(op, model)
    layers = fused_layers(model)
    if not layers or "" in layers:
        kind = type(model).__name__
        raise ValueError(f"{op}: model must contain fused layers, got a {kind} without; inject it first")
    config = config_of_layers(op, layers)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.adapter.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.adapter.b
    for name, bias in _biases(model, layers, config.bias).items():
        parent = name.rpartition(".")[0]
        name = f"{parent}.base_layer.bias" if parent in layers else name
        tensors[f"base_model.model.{name}"] = bias
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{op}: model must hold data, got {name} on meta")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = fields_from_config(config, model, layers, _base_names(model, layers))
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{op}: folder must be a directory, got the file {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder,
        {_WEIGHTS: save(tensors, metadata={"format": "pt"}), _CONFIG: json.dumps(fields, indent=2).encode()},
    )


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Read an adapter that ``save_adapter`` or PEFT wrote, into ``model``, in place.

    A plain model is injected with the layers that the files name; the adapters train, and the rest is frozen
    but for the biases that the files' ``bias`` option names. An injected model is filled, and keeps its own
    dropout and what trains. Tensors are cast to the dtype of the adapters: float32 beside a 16-bit base.

    Args:
        model: a plain model, or one injected with the layers, ranks and scales of the files.
        folder: holds adapter_config.json and adapter_model.safetensors or, read without running code,
            adapter_model.bin.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: the folder or a file is missing. ValueError: a file is broken, or does not fit the
            model or its own config. TypeError: a layer is not a plain ``nn.Linear``. NotImplementedError:
            the adapter has an option that changes what it computes and is not known here. The model is then
            as before.
    """
    op = "load_adapter"
    check_model(op, model)
    stored = _read(op, Path(folder))
    layers = fused_layers(model)
    if layers:
        _fill(op, model, layers, stored)
    else:
        _inject(op, model, stored)
    return model


def _inject(op: str, model: nn.Module, stored: _Stored) -> None:
    check_uninjected(op, model)
    modules = {name: module for name, module in named_modules(model) if name}
    _check_names(op, "layers", _expected(model, modules, stored), stored.factors)
    layers = {}
    for name, factors in stored.factors.items():
        check_linear(op, f"layer {name!r}", modules[name])
        weight, own = modules[name].weight, stored.config.for_layer(name)
        _check_shapes(op, name, factors, own.r, weight)
        options = {"device": weight.device, "dtype": adapter_dtype(weight.dtype)}
        a, b = (nn.Parameter(factors[letter].to(**options, copy=True)) for letter in "AB")
        layers[name] = FusedLoRALinear(modules[name], LoRA.from_factors(own, a, b), stored.config)
        layers[name].peft_fields = stored.peft_fields
    check_called(op, model, {name: layer.base for name, layer in layers.items()})
    copies = _bias_copies(op, model, stored, layers)
    _copy(copies)
    install(model, {id(layer.base): layer for layer in layers.values()})
    set_trainable(model, layers.values())


def _fill(op: str, model: nn.Module, layers: Mapping[str, FusedLoRALinear], stored: _Stored) -> None:
    _check_names(op, "layers", layers, stored.factors)
    config = config_of_layers(op, layers)
    if config.bias != stored.config.bias:
        raise ValueError(f"{op}: bias must be {config.bias!r} as in the model, got {stored.config.bias!r}")
    copies = []
    for name, layer in layers.items():
        own, adapter = stored.config.for_layer(name), layer.adapter
        if layer.merged:
            raise ValueError(f"{op}: layer {name!r} must not be merged, got merged; unmerge the model first")
        if own.r != adapter.rank:
            raise ValueError(f"{op}: rank of {name!r} must be {adapter.rank} as in the model, got {own.r}")
        if not math.isclose(own.scale, adapter.scale):
            expected = adapter.scale
            raise ValueError(f"{op}: scale of {name!r} must be {expected} as in the model, got {own.scale}")
        _check_shapes(op, name, stored.factors[name], own.r, layer.weight)
        copies += [(adapter.a, stored.factors[name]["A"]), (adapter.b, stored.factors[name]["B"])]
    copies += _bias_copies(op, model, stored, layers)
    _copy(copies)
    for layer in layers.values():
        layer.peft_fields = stored.peft_fields


def _expected(model: nn.Module, modules: Mapping[str, nn.Module], stored: _Stored) -> set[str]:
    """Return the layers that the config targets or the files name, as far as the model has them."""
    expected = set(stored.factors) & set(modules)
    if stored.exact:
        head, targets = output_embedding(model), stored.config.target_modules
        for name, module in modules.items():
            if type(module) is nn.Linear:
                targeted = module is not head if targets == "all-linear" else selects(targets, name)
                expected |= {name} if targeted else set()
    return expected


def _biases(model: nn.Module, layers: Collection[str], mode: str) -> dict[str, nn.Parameter]:
    """Return the biases that belong to an adapter on ``layers``, named as in the base model."""
    found = {}
    for name, parameter in model.named_parameters() if mode != "none" else ():
        parent, _, last = name.rpartition(".")
        if last == "bias":
            owner = parent.removesuffix(".base") if parent.removesuffix(".base") in layers else parent
            if mode == "all" or owner in layers:
                found[f"{owner}.bias" if owner else "bias"] = parameter
    return found


def _bias_copies(
    op: str, model: nn.Module, stored: _Stored, layers: Collection[str]
) -> list[tuple[nn.Parameter, Tensor]]:
    biases = _biases(model, layers, stored.config.bias)
    _check_names(op, "biases", biases, stored.biases)
    for name, tensor in stored.biases.items():
        if tensor.shape != biases[name].shape:
            expected, actual = tuple(biases[name].shape), tuple(tensor.shape)
            raise ValueError(f"{op}: {name} must be (N,) = {expected}, got {actual}")
    return [(biases[name], tensor) for name, tensor in stored.biases.items()]


@torch.no_grad()
def _copy(copies: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    # everything that can fail comes before the first write
    ready = [(parameter, tensor.to(parameter.device, parameter.dtype)) for parameter, tensor in copies]
    for parameter, tensor in ready:
        parameter.copy_(tensor)


def _base_names(model: nn.Module, layers: Collection[str]) -> list[str]:
    inside = tuple(f"{name}." for name in layers)
    return [name for name, _ in named_modules(model) if name and not name.startswith(inside)]


def _check_names(op: str, what: str, expected: Collection[str], actual: Collection[str]) -> None:
    for kind, names in (("lacks", set(expected) - set(actual)), ("adds", set(actual) - set(expected))):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{op}: adapter must fit the model, got {what} where it {kind} {first!r}{more}")


def _check_shapes(op: str, name: str, factors: Mapping[str, Tensor], rank: int, weight: Tensor) -> None:
    N, K = weight.shape
    for letter, spelled, shape in (("A", "(R, K)", (rank, K)), ("B", "(N, R)", (N, rank))):
        actual = tuple(factors[letter].shape)
        if actual != shape:
            raise ValueError(f"{op}: lora_{letter} of {name!r} must be {spelled} = {shape}, got {actual}")


def _read(op: str, folder: Path) -> _Stored:
    if not folder.is_dir():
        raise FileNotFoundError(f"{op}: folder must be a directory on this machine, got {str(folder)!r}")
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{op}: folder must hold {_CONFIG}, got {str(folder)!r} without")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{op}: {_CONFIG} must be JSON, got a file that is not ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{op}: {_CONFIG} must hold a JSON object, got {type(fields).__name__}")
    # the options first: an adapter of another kind has tensors of other names
    config_from_fields(op, fields, ["any"])
    factors, biases = _sort(op, _read_tensors(op, folder))
    config, kept, exact = config_from_fields(op, fields, sorted(factors))
    for name, pair in factors.items():
        rank, (a, b) = config.for_layer(name).r, (pair["A"], pair["B"])
        if a.dim() != 2 or b.dim() != 2 or not rank == a.shape[0] == b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            what = f"lora_A and lora_B of {name!r}"
            raise ValueError(f"{op}: {what} must have the config's rank {rank}, got {shapes}")
    return _Stored(config, kept, exact, factors, biases)


def _read_tensors(op: str, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    unreadable = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, struct.error)
    for name in (_WEIGHTS, _PICKLE):
        path = folder / name
        if path.is_file():
            try:
                if name == _WEIGHTS:
                    tensors = load(path.read_bytes())
                else:
                    tensors = torch.load(path, map_location="cpu", weights_only=True)
            except (SafetensorError, *unreadable) as error:
                line = str(error).partition("\n")[0]
                message = f"{op}: {name} must be a complete file of tensors, got one that is not ({line})"
                raise ValueError(message) from error
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError(f"{op}: {name} must hold a dict of tensors, got {type(tensors).__name__}")
            return tensors
    raise FileNotFoundError(f"{op}: folder must hold {_WEIGHTS} or {_PICKLE}, got {str(folder)!r} without")


def _sort(op: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {key} must be floating point, got {tensor.dtype}")
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif match := _BIAS.fullmatch(key):
            biases[f"{match[1].removesuffix('base_layer.')}bias"] = tensor
        elif "lora_embedding" in key or "lora_magnitude" in key:
            raise NotImplementedError(f"{op}: adapter must be plain LoRA, got {key}; load it with PEFT")
        else:
            raise ValueError(f"{op}: adapter must hold lora_A, lora_B and biases only, got {key}")
    for name, pair in factors.items():
        if len(pair) != 2:
            found = f"lora_{min(pair)}"
            raise ValueError(f"{op}: adapter must hold lora_A and lora_B of {name!r}, got {found} alone")
    if not factors:
        raise ValueError(f"{op}: adapter must hold lora_A and lora_B of a layer, got none")
    return dict(sorted(factors.items())), biases


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; on failure no temporary file is left."""
    with ExitStack() as cleanup:
        renames = []
        for name, data in contents.items():
            path = folder / f".{name}.{uuid.uuid4().hex}"
            cleanup.callback(path.unlink, missing_ok=True)
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            renames.append((path, folder / name))
        for path, target in renames:
            os.replace(path, target)
