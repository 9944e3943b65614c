"""Pruned layers on disk, one file each, so that pruning goes on where it was stopped."""

import json
from pathlib import Path

from torch import nn

from .adapter_tensors import write_files
from .bitmap_weight import BitmapWeight
from .layer_pruned import Pruned
from .salr_config import SALRConfig
from .salr_pruning import Cut, checksum

__all__ = ["layer_key", "read_layer", "write_layer"]

_FORMAT = "lowrank-ops salr layer 1"


def layer_key(linear: nn.Linear, config: SALRConfig, cut: Cut | None) -> str:
    """Return everything that the pruned layer follows from, the values of the weight as a checksum."""
    w = linear.weight
    options = ("sparsity", "residual_rank", "scope", "structure", "svd")
    fields = {name: getattr(config, name) for name in options}
    facts = {"shape": list(w.shape), "dtype": str(w.dtype), "cut": cut, "weight": checksum(w)}
    return json.dumps(fields | facts)


def write_layer(op: str, folder: Path, name: str, key: str, pruned: Pruned) -> None:
    """Write the compressed weight and the residual, in the bits that they were made in."""
    from safetensors.torch import save

    residual_a, residual_b = pruned.residual
    tensors = {f"weight.{field}": t for field, t in pruned.weight.tensors.items()}
    tensors |= {"origin": pruned.origin, "residual_a": residual_a, "residual_b": residual_b}
    tensors = {field: t.detach().cpu().contiguous() for field, t in tensors.items()}
    write_files(op, folder, {f"{name}.safetensors": save(tensors, {"format": _FORMAT, "key": key})})


def read_layer(
    op: str, folder: Path, name: str, key: str, linear: nn.Linear, config: SALRConfig
) -> Pruned | None:
    """Return what :func:`write_layer` wrote, on the device of ``linear``; None without a file.

    Raises:
        ValueError: the file is broken, or of another weight or config.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / f"{name}.safetensors"
    if not path.is_file():
        return None
    device, tensors = linear.weight.device, {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {field: file.get_tensor(field) for field in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        message = f"{op}: {path.name} must be a complete file, got one that is not ({error})"
        raise ValueError(message) from error
    if metadata.get("format") != _FORMAT or metadata.get("key") != key:
        raise ValueError(
            f"{op}: folder must hold layers of this model and config, got another's {path.name}; "
            "pass an empty one"
        )
    tensors = {field: t.to(device) for field, t in tensors.items()}
    residual = tensors.pop("residual_a"), tensors.pop("residual_b")
    origin = tensors.pop("origin")
    parts = {field.removeprefix("weight."): t for field, t in tensors.items()}
    weight = BitmapWeight(parts, (linear.out_features, linear.in_features), config.structure)
    return Pruned(weight, origin, residual)
