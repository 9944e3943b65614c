"""LoRI: masks from a calibrated model, sparse adapters, and the recipes built of them."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .adapter_tensors import folder_path, read_fields
from .inject import check_model, fused_layers, inject, unwrapped
from .largest import largest_entries
from .layer_masked import FusedMaskedLoRALinear
from .lora_files import write_lora
from .lori_config import LoRIConfig
from .methods.lori import LoRI, read_factor
from .own_files import is_own, read_own
from .seeded import layer_seed
from .sparse_factor import SparseFactor
from .sparse_mask import SparseMask

__all__ = ["export_peft", "extract_masks", "fit", "masks_of", "read_masks", "sparsify", "train_only"]

Masks = Mapping[str, SparseMask]


def fit(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    config: LoRIConfig | None = None,
    *,
    calibrate: Callable[[nn.Module], object] | None = None,
    sparsity: float = 0.9,
    resample_a: bool = False,
) -> nn.Module:
    """Train LoRI-S by the paper's recipe: calibrate a dense B, keep its largest entries' places, train those.

    The steps, which can be taken one by one as well::

        lo.inject(model, config)
        calibrate(model)
        masks = lo.lori.extract_masks(model, sparsity)
        lo.lori.sparsify(model, masks)
        train(model)

    Args:
        model: a plain model, with ``config``; or one injected with a LoRIConfig, without.
        train: trains what of the model requires a gradient; is called with ``model``, and its result dropped.
            It must make an optimizer of its own: the parameters are others than those of the calibration.
        config: of the adapters.
        calibrate: the same for the calibration; None takes ``train``, as the authors' code does: a full run.
        sparsity, resample_a: of ``extract_masks`` and ``sparsify``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError, TypeError: as ``inject``, ``extract_masks`` and ``sparsify`` do; B is sparse already.

    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448).
    """
    for name, value in (("train", train), ("calibrate", train if calibrate is None else calibrate)):
        if not callable(value):
            raise TypeError(f"fit: {name} must be callable, got {type(value).__name__}")
    _check_sparsity("fit", sparsity)
    if config is not None:
        inject(model, config)
    for name, layer in _layers("fit", model).items():
        if layer.adapter.is_sparse:
            raise ValueError(f"fit: B of {name!r} must be dense, got a sparse one; call train itself")
    (calibrate or train)(model)
    sparsify(model, extract_masks(model, sparsity), resample_a=resample_a)
    train(model)
    return model


@torch.no_grad()
def extract_masks(model: nn.Module, sparsity: float = 0.9) -> dict[str, SparseMask]:
    """Return which entries of every B to keep: the largest of the whole model in magnitude.

    One threshold for all layers and projections; a layer's own density is what comes out, zero included. Of n
    entries, exactly ⌊(1 - sparsity)·n⌋ are kept, in the arithmetic of floats; equal ones at the threshold in
    the order of the layers, and row by row. Zeros are never kept: with fewer entries that are not zero, those
    are kept and a warning says so.

    Args:
        model: injected with a LoRIConfig and trained. On "meta" the masks have the right number in all,
            spread evenly, to plan with.
        sparsity: share of entries to drop, in [0, 1).

    Returns:
        Name of a layer -> its mask, on the layer's device.

    Raises:
        ValueError: the model has no LoRI layers, B is zero everywhere or not finite, or ``sparsity`` is out
            of range. TypeError: an argument is of the wrong type.

    Memory: a few copies of one B; each B is read on its own device, three times.
    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448). Their code keeps all that reach the threshold: more on
    ties, and everything where the threshold is zero.
    """
    op = "extract_masks"
    _check_sparsity(op, sparsity)
    layers = _layers(op, model)
    tensors = {name: layer.adapter.factors(layer.weight).b for name, layer in layers.items()}
    total = sum(b.numel() for b in tensors.values())
    keep = int((1 - sparsity) * total)
    if any(b.is_meta for b in tensors.values()):
        return _planned(tensors, keep)
    for name, b in tensors.items():
        if not bool(b.isfinite().all()):
            raise ValueError(f"{op}: B of {name!r} must be finite, got values that are not")
    filled = sum(int(b.count_nonzero()) for b in tensors.values())
    if not filled:
        raise ValueError(f"{op}: model must be calibrated, got a B of zeros in all layers; train it first")
    if filled < keep:
        warnings.warn(f"{op}: kept {filled} entries of B and not {keep}: the others are zero", stacklevel=3)
    return {name: SparseMask.from_dense(taken) for name, taken in largest_entries(tensors, keep)}


@torch.inference_mode(False)
@torch.no_grad()
def sparsify(
    model: nn.Module, masks: Masks, *, keep_values: bool = False, resample_a: bool = False
) -> nn.Module:
    """Make every B sparse, in place: LoRI-D becomes LoRI-S. Its entries are zero again, and A stays.

    The parameter of a layer is then ``adapter.b.values``, a new vector of as many numbers as the mask has
    entries; an optimizer that holds the old parameter must be made anew.

    Args:
        model: injected with a LoRIConfig, unmerged.
        masks: name of a layer -> mask, (N, R), for all of its layers, as ``extract_masks`` returns them.
        keep_values: take over the values of B at the masks.
        resample_a: draw another A for each layer, as the authors' code does; the config's seed changes too.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no LoRI layers or merged ones, or is in DistributedDataParallel, or the
            masks do not fit. TypeError: an argument is of the wrong type. The model is then as before.
    """
    layers = _layers("sparsify", model)
    _check_undistributed("sparsify", model)
    masks = _check_masks("sparsify", layers, masks)
    factors = {}
    for name, layer in layers.items():
        b, mask = layer.adapter.factors(layer.weight).b, masks[name]
        factors[name] = SparseFactor(mask, _pack(mask, b) if keep_values else b.new_zeros(mask.nnz))
    for name, layer in layers.items():
        layer.adapter.set_b(factors[name])
        if resample_a:
            layer.config = replace(layer.config, seed=layer_seed(layer.config.seed, "resampled"))
            layer.adapter.set_seed(layer_seed(layer.config.seed, name))
    return model


@torch.inference_mode(False)
@torch.no_grad()
def train_only(model: nn.Module, masks: Masks) -> nn.Module:
    """Let the entries at ``masks`` train from now on, in place; all others of B keep their bits.

    This is continual learning: a model trained for safety, say, goes on with the mask of its next task, which
    came from a calibration of its own. B then exists where it did or ``masks`` has an entry. It starts as it
    is, and the forward pass uses all of it. What does not train is no parameter, so that no optimizer touches
    it, nor its weight decay; an optimizer that holds the old parameters must be made anew.

    Args:
        model: injected with a LoRIConfig, unmerged; dense or sparse.
        masks: name of a layer -> mask, (N, R), for all of its layers.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has no LoRI layers, merged ones, or no data ("meta"), or is in
            DistributedDataParallel, or the masks do not fit. TypeError: an argument is of the wrong type.
            The model is then as before.

    Source: Zhang et al. 2025, LoRI (arXiv:2504.07448), continual learning.
    """
    op = "train_only"
    layers = _layers(op, model)
    _check_undistributed(op, model)
    masks = _check_masks(op, layers, masks)
    factors = {}
    for name, layer in layers.items():
        adapter, mask = layer.adapter, masks[name]
        b = adapter.factors(layer.weight).b
        if b.is_meta:
            raise ValueError(f"{op}: model must hold data, got B of {name!r} on meta")
        support = _support(adapter).union(mask)
        factors[name] = SparseFactor(support, support.pack(b), mask)
    for name, layer in layers.items():
        layer.adapter.set_b(factors[name])
    return model


def masks_of(model: nn.Module) -> dict[str, SparseMask]:
    """Return the mask of every B by the layer's name: where it has entries; all of them where B is dense.

    Raises:
        ValueError: the model has no LoRI layers. TypeError: it is no module.
    """
    return {name: _support(layer.adapter) for name, layer in _layers("masks_of", model).items()}


def read_masks(folder: str | os.PathLike[str]) -> dict[str, SparseMask]:
    """Return the masks in the files of a LoRI-S adapter, by the layer's name, on the CPU; needs no model.

    Raises:
        FileNotFoundError: the folder or a file is missing. ValueError: the files are of another kind, or B is
            dense in them, or they are broken. TypeError: ``folder`` is no path.
    """
    op = "read_masks"
    folder = folder_path(op, folder)
    fields = read_fields(op, folder)
    if not is_own(fields) or fields.get("peft_type") != "LORI":
        kind = fields.get("peft_type")
        raise ValueError(f"{op}: folder must hold a LoRI adapter, got one of {kind!r}")
    _, tensors = read_own(op, folder, fields)
    found = {}
    for name, own in tensors.items():
        _, b = read_factor(op, name, own, None, torch.empty(0))
        if isinstance(b, Tensor):
            raise ValueError(f"{op}: folder must hold a sparse adapter, got a dense B of {name!r}")
        found[name] = b.mask
    return found


def export_peft(
    model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters as plain LoRA, which PEFT and ``load_adapter`` read: A as numbers, B dense.

    Args:
        model: injected with a LoRIConfig.
        folder: made if it does not exist; files of an earlier adapter in it are replaced.
        dtype: of the tensors in the file; None keeps the adapter's, float32 beside a 16-bit base.

    Raises:
        ValueError: the model has no LoRI layers, or no data ("meta"), or ``folder`` is a file. TypeError: an
            argument is of the wrong type. OSError: the folder cannot be written.
    """
    op = "export_peft"
    layers = _layers(op, model)
    factors = {name: layer.adapter.factors(layer.weight) for name, layer in layers.items()}
    base = getattr(unwrapped(model), "name_or_path", None) or None
    write_lora(op, folder_path(op, folder), factors, base=base, dtype=dtype)


def _layers(op: str, model: nn.Module) -> dict[str, FusedMaskedLoRALinear]:
    check_model(op, model)
    layers = fused_layers(unwrapped(model))
    if not layers:
        kind = type(unwrapped(model)).__name__
        raise ValueError(f"{op}: model must have LoRI layers, got a {kind} without; inject it first")
    for name, layer in layers.items():
        if not isinstance(layer.adapter, LoRI):
            kind = layer.adapter.name
            raise ValueError(f"{op}: model must have LoRI layers, got {kind!r} at {name!r}")
    return layers


def _check_undistributed(op: str, model: nn.Module) -> None:
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        # its reducer knows the parameters of its start only: new ones would differ between processes
        raise ValueError(
            f"{op}: model must not be in DistributedDataParallel, got one that is; wrap it again afterwards"
        )


def _check_sparsity(op: str, sparsity: object) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{op}: sparsity must be a number, got {type(sparsity).__name__}")
    if not 0 <= sparsity < 1 or math.isnan(sparsity):
        raise ValueError(f"{op}: sparsity must be in [0, 1), got {sparsity}")


def _check_masks(
    op: str, layers: Mapping[str, FusedMaskedLoRALinear], masks: object
) -> dict[str, SparseMask]:
    """Return ``masks`` on the devices of their layers, or raise."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"{op}: masks must be a dict, got {type(masks).__name__}")
    for kind, names in (("lack", layers.keys() - masks.keys()), ("add", masks.keys() - layers.keys())):
        if names:
            first = min(map(str, names))
            raise ValueError(f"{op}: masks must fit the layers of the model, got some that {kind} {first!r}")
    found = {}
    for name, layer in layers.items():
        mask, expected = masks[name], (layer.out_features, layer.adapter.rank)
        if not isinstance(mask, SparseMask):
            raise TypeError(f"{op}: mask of {name!r} must be a SparseMask, got {type(mask).__name__}")
        if mask.shape != expected:
            raise ValueError(f"{op}: mask of {name!r} must be (N, R) = {expected}, got {mask.shape}")
        if layer.merged:
            raise ValueError(f"{op}: layer {name!r} must not be merged, got merged; unmerge the model first")
        found[name] = mask.to(layer.adapter.a.device)
    return found


def _planned(tensors: Mapping[str, Tensor], keep: int) -> dict[str, SparseMask]:
    total, seen, masks = sum(b.numel() for b in tensors.values()), 0, {}
    for name, b in tensors.items():
        first, seen = seen, seen + b.numel()
        masks[name] = SparseMask.meta(tuple(b.shape), keep * seen // total - keep * first // total)
    return masks


def _pack(mask: SparseMask, b: Tensor) -> Tensor:
    return b.new_empty(mask.nnz) if b.is_meta else mask.pack(b)


def _support(adapter: LoRI) -> SparseMask:
    if adapter.is_sparse:
        return adapter.b.mask
    return SparseMask.from_dense(torch.ones(adapter.b.shape, dtype=torch.bool, device=adapter.b.device))
