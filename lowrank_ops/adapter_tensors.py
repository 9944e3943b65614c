"""The files of an adapter as such: which tensors they hold, and writing them both or neither."""

import json
import os
import pickle
import re
import shutil
import struct
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Tensors",
    "folder_path",
    "read_fields",
    "read_tensors",
    "sort_tensors",
    "write_files",
]

CONFIG, WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_BIAS = re.compile(r"base_model\.model\.((?:.+\.)?)(?:base_layer\.)?bias")
# what PEFT adds by itself for an adapter on a head, and for embeddings
_COPY = re.compile(r"base_model\.model\.(?:(.+)\.base_layer|((?:.+\.)?(?:embed_tokens|lm_head)))\.weight")


class Tensors(NamedTuple):
    """Tensors of one file: factors and copied base weights by layer name, biases by parameter name."""

    factors: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    copies: dict[str, Tensor]


def folder_path(op: str, folder: str | os.PathLike[str]) -> Path:
    """Return ``folder`` as a path, or raise."""
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"{op}: folder must be a str or a path, got {type(folder).__name__}")
    return Path(folder)


def read_fields(op: str, folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, or raise."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{op}: folder must be a directory on this machine, got {str(folder)!r}")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{op}: folder must hold {CONFIG}, got {str(folder)!r} without")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{op}: {CONFIG} must be JSON, got a file that is not ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{op}: {CONFIG} must hold a JSON object, got {type(fields).__name__}")
    return fields


def read_tensors(op: str, folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, without running code, or raise."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    unreadable = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, struct.error)
    for name in (WEIGHTS, _PICKLE):
        path = folder / name
        if path.is_file():
            try:
                if name == WEIGHTS:
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
    raise FileNotFoundError(f"{op}: folder must hold {WEIGHTS} or {_PICKLE}, got {str(folder)!r} without")


def sort_tensors(op: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tell factors, biases and copies of base weights apart, or raise at the first tensor that is none."""
    factors: dict[str, dict[str, Tensor]] = {}
    biases, copies = {}, {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {key} must be floating point, got {tensor.dtype}")
        if match := _FACTOR.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif match := _BIAS.fullmatch(key):
            biases[f"{match[1].removesuffix('base_layer.')}bias"] = tensor
        elif match := _COPY.fullmatch(key):
            copies[match[1] or match[2]] = tensor
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
    return Tensors(dict(sorted(factors.items())), biases, copies)


def write_files(op: str, folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all of ``contents`` to ``folder``, which is made, or leave its files as they were."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{op}: folder must be a directory, got the file {str(folder)!r}")
        for name in contents:
            if (folder / name).is_dir():
                raise ValueError(f"{op}: {name} must be a file or absent, got a directory in {str(folder)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, contents)
    except OSError as error:
        reason = error.strerror or str(error)
        failure = type(error)(
            f"{op}: folder must be a directory that can be written, got {str(folder)!r} ({reason})"
        )
        failure.errno = error.errno
        raise failure from error


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; on failure take back what was renamed."""
    with ExitStack() as cleanup, ExitStack() as undo:
        renames = []
        for name, data in contents.items():
            path, old = (folder / f".{name}.{uuid.uuid4().hex}{end}" for end in ("", ".old"))
            target = folder / name
            cleanup.callback(path.unlink, missing_ok=True)
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.is_file():
                cleanup.callback(old.unlink, missing_ok=True)
                shutil.copy2(target, old)
            renames.append((path, target, old if target.is_file() else None))
        for path, target, old in renames:
            os.replace(path, target)
            if old is None:
                undo.callback(target.unlink, missing_ok=True)
            else:
                undo.callback(os.replace, old, target)
        undo.pop_all()
