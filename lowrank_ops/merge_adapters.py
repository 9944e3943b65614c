"""Several adapters as one: their updates' weighted sum, exact, or the sum of their factors."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .adapter_files import read_lora
from .adapter_tensors import folder_path, read_fields, sort_tensors
from .config import LoRAConfig
from .inject import fused_layers, unwrapped
from .lora_files import write_lora
from .methods import Factors
from .methods.lori import read_factor
from .own_files import is_own, read_own
from .seeded import draw_uniform
from .sparse_factor import SparseFactor

__all__ = ["MergedAdapter", "merge_adapters"]

_OP = "merge_adapters"
_METHODS = ("cat", "linear")
_MAX_RANK = 512

Source = str | os.PathLike[str] | nn.Module | Mapping[str, Factors] | tuple[Mapping[str, Tensor], LoRAConfig]


@dataclass(frozen=True, eq=False)
class MergedAdapter:
    """A LoRA adapter by itself: name of a layer -> its factors, ΔW = scale · b a, on the CPU.

    Attributes:
        factors: a (R, K), b (N, R) and scale of each layer; a layer's rank is its own.
        base: name of the base model that the adapters name in their files, if it is one.
    """

    factors: Mapping[str, Factors]
    base: str | None = None

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write PEFT's files, which ``load_adapter`` and ``PeftModel.from_pretrained`` read.

        Args:
            folder: made if it does not exist; files of an earlier adapter in it are replaced.
            dtype: of the tensors in the file; None keeps that of the factors.

        Raises:
            ValueError: ``folder`` is a file. TypeError: an argument is of the wrong type. OSError: the folder
                cannot be written.
        """
        op = "MergedAdapter.save"
        write_lora(op, folder_path(op, folder), self.factors, base=self.base, dtype=dtype)

    def __repr__(self) -> str:
        ranks = sorted({a.shape[0] for a, _, _ in self.factors.values()})
        return f"MergedAdapter({len(self.factors)} layers, ranks {', '.join(map(str, ranks))})"


@torch.no_grad()
def merge_adapters(
    folders_or_states: Sequence[Source], weights: Sequence[float], method: str = "cat"
) -> MergedAdapter:
    """Merge LoRA and LoRI adapters of one base model into one LoRA adapter.

    With factors a_t, b_t and scale s_t of adapter t, and its weight w_t:

    * "cat": a = [w_1 s_1 a_1; …], b = [b_1, …], scale 1. The update is Σ w_t s_t b_t a_t exactly; the rank is
      the sum of the ranks, which may differ.
    * "linear": a = Σ ±c_t a_t, b = Σ c_t b_t, scale 1, with c_t = √(|w_t| s_t) and the sign of w_t. Ranks are
      equal, and stay. The update is that of "cat" and Σ_{i≠j} ±c_i c_j b_i a_j besides: cross terms as
      large as the rest where the a_t are independent, as LoRI's are. Prefer "cat".

    A layer that some adapters lack is merged of those that have it.

    Args:
        folders_or_states: at least one adapter, each a folder that ``save_adapter`` or PEFT wrote (LoRA or
            LoRI), an injected model, a dict of layer name -> ``Factors``, or a pair of PEFT's state dict and
            its ``LoRAConfig``, which says the scale.
        weights: a finite number for each, dimensionless; may be negative. The authors of LoRI take 0.3 to
            0.5 for three or four tasks.
        method: "cat" or "linear".

    Returns:
        The factors by layer, on the CPU, in the widest dtype among the adapters, at least float32.

    Raises:
        ValueError: no adapters, numbers of weights and adapters that differ, ranks that "linear" cannot add,
            a sum of ranks over 512, shapes that do not fit, or broken files. TypeError: an argument of the
            wrong type. FileNotFoundError: a folder or a file is missing. NotImplementedError: an adapter
            trains biases, or is of a kind that has no factors.

    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448), which merges as PEFT's add_weighted_adapter does.
    """
    _check_arguments(folders_or_states, weights, method)
    read = [_factors(i, adapter) for i, adapter in enumerate(folders_or_states)]
    bases = {base for _, base in read if base is not None}
    parts: dict[str, list[tuple[float, Factors]]] = {}
    for (factors, _), weight in zip(read, weights, strict=True):
        for name, own in factors.items():
            parts.setdefault(name, []).append((float(weight), own))
    dtype = torch.float32
    for _, own in (part for layer in parts.values() for part in layer):
        dtype = torch.promote_types(dtype, torch.promote_types(own.a.dtype, own.b.dtype))
    _check_parts(parts, method)
    merge = _cat if method == "cat" else _linear
    merged = {name: merge(layer, dtype) for name, layer in parts.items()}
    return MergedAdapter(MappingProxyType(merged), bases.pop() if len(bases) == 1 else None)


def _check_arguments(folders_or_states: object, weights: object, method: object) -> None:
    if not isinstance(folders_or_states, (list, tuple)) or not isinstance(weights, (list, tuple)):
        kinds = f"{type(folders_or_states).__name__} and {type(weights).__name__}"
        raise TypeError(f"{_OP}: folders_or_states and weights must be lists or tuples, got {kinds}")
    if not folders_or_states or len(folders_or_states) != len(weights):
        numbers = f"{len(weights)} for {len(folders_or_states)}"
        raise ValueError(f"{_OP}: weights must be as many as folders_or_states, at least one, got {numbers}")
    for i, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{_OP}: weights[{i}] must be a number, got {type(weight).__name__}")
        if not math.isfinite(weight):
            raise ValueError(f"{_OP}: weights[{i}] must be finite, got {weight}")
    if method not in _METHODS:
        raise ValueError(f'{_OP}: method must be "cat" or "linear", got {method!r}')


def _cat(parts: list[tuple[float, Factors]], dtype: torch.dtype) -> Factors:
    a = torch.cat([weight * own.scale * own.a.to("cpu", dtype) for weight, own in parts])
    return Factors(a, torch.cat([own.b.to("cpu", dtype) for _, own in parts], 1), 1.0)


def _linear(parts: list[tuple[float, Factors]], dtype: torch.dtype) -> Factors:
    a = b = None
    for weight, own in parts:
        factor = weight * own.scale
        root = math.sqrt(abs(factor))
        scaled_a = math.copysign(root, factor) * own.a.to("cpu", dtype)
        scaled_b = root * own.b.to("cpu", dtype)
        a, b = (scaled_a, scaled_b) if a is None else (a + scaled_a, b + scaled_b)
    return Factors(a, b, 1.0)


def _check_parts(parts: Mapping[str, list[tuple[float, Factors]]], method: str) -> None:
    for name, layer in parts.items():
        first, ranks = layer[0][1], [own.a.shape[0] for _, own in layer]
        for _, own in layer:
            shape, expected = (len(own.b), own.a.shape[1]), (len(first.b), first.a.shape[1])
            if shape != expected:
                raise ValueError(f"{_OP}: updates of {name!r} must be (N, K) = {expected}, got {shape}")
        if method == "linear" and len(set(ranks)) > 1:
            raise ValueError(
                f'{_OP}: ranks of {name!r} must be equal for method="linear", got {ranks}; use "cat"'
            )
        if method == "cat" and sum(ranks) > _MAX_RANK:
            raise ValueError(f"{_OP}: ranks of {name!r} must add up to at most {_MAX_RANK}, got {sum(ranks)}")


def _factors(place: int, adapter: object) -> tuple[Mapping[str, Factors], str | None]:
    """Return the factors of each layer, and the base model's name where it is known."""
    if isinstance(adapter, (str, os.PathLike)):
        return _of_folder(folder_path(_OP, adapter))
    if isinstance(adapter, MergedAdapter):
        return adapter.factors, adapter.base
    if isinstance(adapter, nn.Module):
        return _of_model(place, adapter)
    if isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[1], LoRAConfig):
        state, config = adapter
        factors, biases, _ = sort_tensors(_OP, state)
        return _of_lora(config, factors, biases), None
    if isinstance(adapter, Mapping) and adapter:
        for name, own in adapter.items():
            _check_factors(place, name, own)
        return {name: Factors(*own) for name, own in adapter.items()}, None
    raise TypeError(
        f"{_OP}: folders_or_states[{place}] must be a folder, an injected model, a dict of Factors, or a "
        f"state dict and its LoRAConfig, got {type(adapter).__name__}"
    )


def _of_folder(folder: Path) -> tuple[Mapping[str, Factors], str | None]:
    fields = read_fields(_OP, folder)
    base = fields.get("base_model_name_or_path")
    if not is_own(fields):
        config, factors, biases = read_lora(_OP, folder, fields)
        return _of_lora(config, factors, biases), base
    if fields.get("peft_type") != "LORI":
        kind = fields.get("peft_type")
        raise NotImplementedError(f"{_OP}: adapter must be LoRA or LoRI, got {kind!r} in {str(folder)!r}")
    config, tensors = read_own(_OP, folder, fields)
    found = {}
    for name, own in tensors.items():
        seed, b = read_factor(_OP, name, own, None, torch.empty(0))
        b = b.dense() if isinstance(b, SparseFactor) else b
        _, R, K = own["a_seed"].tolist()
        dtype = torch.promote_types(b.dtype, torch.float32)
        found[name] = Factors(draw_uniform(seed, R, K, dtype=dtype, device="cpu"), b, config.scale)
    return found, base


def _of_lora(
    config: LoRAConfig, factors: Mapping[str, Mapping[str, Tensor]], biases: Mapping[str, Tensor]
) -> dict[str, Factors]:
    if biases:
        first = min(biases)
        raise NotImplementedError(f"{_OP}: adapters must train no biases, got {first!r}; merge them in PEFT")
    found = {}
    for name, pair in factors.items():
        own = config.for_layer(name)
        if pair["A"].dim() != 2 or pair["B"].dim() != 2 or not own.r == len(pair["A"]) == pair["B"].shape[1]:
            shapes = f"{tuple(pair['A'].shape)} and {tuple(pair['B'].shape)}"
            raise ValueError(f"{_OP}: factors of {name!r} must have the config's rank {own.r}, got {shapes}")
        found[name] = Factors(pair["A"], pair["B"], own.scale)
    return found


def _of_model(place: int, model: nn.Module) -> tuple[Mapping[str, Factors], str | None]:
    model = unwrapped(model)
    layers = fused_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"{_OP}: folders_or_states[{place}] must have fused layers, got a {kind} without")
    for name, layer in layers.items():
        if layer.config.bias != "none":
            raise NotImplementedError(f"{_OP}: adapters must train no biases, got some of {name!r}")
    found = {name: layer.adapter.factors(layer.weight) for name, layer in layers.items()}
    for name, own in found.items():
        _check_factors(place, name, own)
    return found, getattr(model, "name_or_path", None) or None


def _check_factors(place: int, name: object, own: object) -> None:
    fits = isinstance(own, tuple) and len(own) == 3 and all(isinstance(t, Tensor) for t in own[:2])
    if not fits or not isinstance(name, str):
        kind = type(own).__name__
        raise TypeError(
            f"{_OP}: folders_or_states[{place}] must map names to Factors, got {kind} for {name!r}; "
            "a state dict of tensors needs its LoRAConfig beside it"
        )
    a, b, scale = own
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not math.isfinite(scale):
        shapes = f"{tuple(a.shape)}, {tuple(b.shape)} and {scale}"
        raise ValueError(
            f"{_OP}: factors of {name!r} must be (R, K), (N, R) and a finite scale, got {shapes}"
        )
    if a.is_meta or b.is_meta:
        raise ValueError(f"{_OP}: adapters must hold data, got {name!r} on meta")
