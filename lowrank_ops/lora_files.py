"""Factors of any origin as a LoRA adapter in PEFT's format."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter_tensors import CONFIG, WEIGHTS, write_files
from .methods.base import Factors

__all__ = ["write_lora"]


def write_lora(
    op: str,
    folder: Path,
    factors: Mapping[str, Factors],
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``factors``, by the name of the layer, to ``folder``; ranks and scales may differ.

    Args:
        op: what the errors call the caller.
        folder: made if it does not exist; files of an earlier adapter in it are replaced.
        factors: name of a layer -> a (R, K), b (N, R), scale.
        base: name of the base model, for the files.
        dtype: of the tensors in the file; None keeps theirs.

    Raises:
        ValueError: a tensor holds no data, a layer has no name, or ``folder`` is a file. TypeError: ``dtype``
            is not floating.
    """
    from safetensors.torch import save

    check_file_dtype(op, dtype)
    if "" in factors:
        raise ValueError(f"{op}: model must contain the layers, got a bare one")
    tensors, ranks, alphas = {}, {}, {}
    for name, (a, b, scale) in factors.items():
        for letter, factor in (("A", a), ("B", b)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            if factor.is_meta:
                raise ValueError(f"{op}: model must hold data, got {key} on meta")
            tensors[key] = factor.detach().to("cpu", dtype).contiguous()
        ranks[name], alphas[name] = a.shape[0], scale * a.shape[0]
    fields = _fields(ranks, alphas, base)
    weights = save(tensors, metadata={"format": "pt"})
    write_files(op, folder, {WEIGHTS: weights, CONFIG: json.dumps(fields, indent=2).encode()})


def _fields(ranks: Mapping[str, int], alphas: Mapping[str, float], base: str | None) -> dict[str, Any]:
    (r, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(ranks),
        "use_rslora": False,
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != r},
        "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_bias": False,
        "modules_to_save": None,
        "use_dora": False,
    }


def check_file_dtype(op: str, dtype: object) -> None:
    """Raise unless ``dtype`` is None or a floating dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{op}: dtype must be a floating torch.dtype or None, got {dtype!r}")
