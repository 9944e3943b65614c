"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_config import config_from_fields, config_of_layers, fields_from_config
from .adapter_tensors import (
    CONFIG,
    WEIGHTS,
    folder_path,
    read_fields,
    read_tensors,
    sort_tensors,
    write_files,
)
from .config import LoRAConfig, selects
from .fused_linear import check_linear
from .inject import (
    check_called,
    check_model,
    check_uninjected,
    check_whole,
    fused_layers,
    install,
    named_modules,
    output_embedding,
    set_trainable,
    unwrapped,
)
from .layers import FusedLoRALinear
from .lora_files import check_file_dtype
from .methods.base import adapter_dtype
from .methods.lora import LoRA
from .own_files import is_own, load_own, save_own

__all__ = ["load_adapter", "read_lora", "save_adapter"]


@dataclass(frozen=True)
class _Stored:
    """One adapter as read: factors by layer name, biases by parameter name, and how to understand them."""

    config: LoRAConfig
    peft_fields: dict[str, Any]
    exact: bool
    factors: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    copies: dict[str, Tensor]


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters of ``model`` to ``folder``, as PEFT does: ``PeftModel.from_pretrained`` reads them.

    Both files are written under temporary names and then renamed, so that neither is ever half written, and
    both are as before if one cannot be replaced.
    A merged model saves the same files. The files of a method that PEFT lacks have
    the same names and are read by ``load_adapter`` alone; a tensor that layers share is in them once.

    Args:
        model: an injected model.
        folder: made if it does not exist; files of an earlier adapter in it are replaced.
        dtype: of the floating tensors in the files, as ``torch.bfloat16`` for half their size; None keeps
            theirs, which is float32 for adapters beside a 16-bit base.

    Raises:
        ValueError: the model has no fused layers, or they hold no data ("meta") or a part of it (FSDP), or
            share no config, or ``folder`` is a file. TypeError: ``folder`` is no path, or ``dtype`` not
            floating. OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    op = "save_adapter"
    check_model(op, model)
    check_file_dtype(op, dtype)
    folder, model = folder_path(op, folder), unwrapped(model)
    layers = fused_layers(model)
    if not layers or "" in layers:
        kind = type(model).__name__
        raise ValueError(f"{op}: model must contain fused layers, got a {kind} without; inject it first")
    check_whole(op, layers)
    if any(layer.config.method != "lora" for layer in layers.values()):
        save_own(op, model, layers, folder, dtype)
        return
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
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    fields = fields_from_config(config, model, layers, _base_names(model, layers))
    weights = save(tensors, metadata={"format": "pt"})
    write_files(op, folder, {WEIGHTS: weights, CONFIG: json.dumps(fields, indent=2).encode()})


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Read an adapter that ``save_adapter`` or PEFT wrote, into ``model``, in place.

    A plain model is injected with the layers that the files name; the adapters train, and the rest is frozen
    but for the biases that the files' ``bias`` option names. An injected model is filled, and keeps its own
    dropout and what trains. Tensors are cast to the dtype of the adapters: float32 beside a 16-bit base.
    Copies of base weights, as PEFT adds for an adapter on a head, must equal those of the model.

    Args:
        model: a plain model, or one injected with the layers, ranks and scales of the files.
        folder: holds adapter_config.json and adapter_model.safetensors or, read without running code,
            adapter_model.bin.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: the folder or a file is missing. ValueError: a file is broken, or does not fit the
            model or its own config. TypeError: a layer is not a plain ``nn.Linear``, or an argument or an
            option is of the wrong type. NotImplementedError:
            the adapter has an option that changes what it computes and is not known here. The model is then
            as before.
    """
    op = "load_adapter"
    check_model(op, model)
    folder = folder_path(op, folder)
    fields, inner = read_fields(op, folder), unwrapped(model)
    check_whole(op, fused_layers(inner))
    if is_own(fields):
        load_own(op, model, folder, fields)
        return model
    stored, layers = _read(op, folder, fields), fused_layers(inner)
    if layers:
        _fill(op, inner, layers, stored)
    else:
        check_uninjected(op, model)
        _inject(op, inner, stored)
    return model


def read_lora(
    op: str, folder: Path, fields: dict[str, Any]
) -> tuple[LoRAConfig, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the config, factors by layer and biases of the LoRA adapter in ``folder``, or raise."""
    stored = _read(op, folder, fields)
    return stored.config, stored.factors, stored.biases


# tensors that are made in inference mode could never train
@torch.inference_mode(False)
@torch.no_grad()
def _inject(op: str, model: nn.Module, stored: _Stored) -> None:
    modules = {name: module for name, module in named_modules(model) if name}
    _check_names(op, "layers", _expected(model, modules, stored), stored.factors)
    _check_copies(op, modules, stored)
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
    _check_copies(op, dict(named_modules(model)), stored)
    copies += _bias_copies(op, model, stored, layers)
    _copy(copies)
    for layer in layers.values():
        layer.peft_fields = stored.peft_fields


def _expected(model: nn.Module, modules: Mapping[str, nn.Module], stored: _Stored) -> set[str]:
    """Return the layers that the config targets or the files name, as far as the model has them."""
    expected = set(stored.factors) & set(modules)
    if stored.exact:
        head, targets = output_embedding(model), stored.config.target_modules
        if targets == "all-linear":
            expected = {name for name in expected if modules[name] is not head}
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


def _check_copies(op: str, modules: Mapping[str, nn.Module], stored: _Stored) -> None:
    """Raise unless the base weights that the files hold are those of the model, to the coarser dtype."""
    for name, copy in stored.copies.items():
        weight = getattr(modules.get(name), "weight", None)
        equal = isinstance(weight, Tensor) and weight.shape == copy.shape
        if equal and not weight.is_meta:
            dtype = min(weight.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)
            equal = torch.equal(weight.detach().to(dtype), copy.to(weight.device, dtype))
        if not equal:
            raise ValueError(
                f"{op}: model must have the base weights that the adapter was trained on, got another weight "
                f"of {name!r}"
            )


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


def _read(op: str, folder: Path, fields: dict[str, Any]) -> _Stored:
    # the options first: an adapter of another kind has tensors of other names
    config_from_fields(op, fields, ["any"])
    factors, biases, copies = sort_tensors(op, read_tensors(op, folder))
    config, kept, exact = config_from_fields(op, fields, sorted(factors))
    targets = config.target_modules
    for name, pair in factors.items():
        if exact and targets != "all-linear" and not selects(targets, name):
            raise ValueError(f"{op}: target_modules must select all layers of the adapter, got not {name!r}")
        rank, (a, b) = config.for_layer(name).r, (pair["A"], pair["B"])
        if a.dim() != 2 or b.dim() != 2 or not rank == a.shape[0] == b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            what = f"lora_A and lora_B of {name!r}"
            raise ValueError(f"{op}: {what} must have the config's rank {rank}, got {shapes}")
    return _Stored(config, kept, exact, factors, biases, copies)
