"""SALOR: prune A and B while they train, then keep what is left in its compact form."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_tensors import folder_path
from .fused_linear import FusedLinear
from .inject import check_model, fused_layers, unwrapped
from .lora_files import write_lora
from .methods.salor import SALOR
from .salor_compact import compact, dense_layers
from .salor_config import SALORConfig, check_count
from .salor_units import keep_components, keep_entries

__all__ = ["PruningSchedule", "compact", "densities", "export_peft"]

_OP = "PruningSchedule"
# of the running mean of |θ · gradient|
_DECAY = 0.9
_TINY = 1e-9


class PruningSchedule:
    """Prunes the adapters of a model that was injected with a ``SALORConfig``, step by step.

    At step t of ``total_steps`` the share of pruned units is sparsity · (1 - (1 - τ)³), where τ goes from 0
    at t0, the end of the warm-up, to 1 at t1: it grows every ``config.every`` steps, and at t1. Later the
    masks stay, and nothing that was pruned comes back. Units are ranked over all layers, A and B separately;
    one unit of every A and every B stays, of equal scores the first. ::

        schedule = lo.salor.PruningSchedule(model, config, optimizer=optimizer, total_steps=1000)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            schedule.step()  # before zero_grad
            optimizer.zero_grad()
        schedule.finish()  # the compact form

    What is pruned is zero, and stays zero, bit for bit: its gradient is zero, and its state in the optimizer,
    as Adam's moments, is set to zero when it goes; weight decay does nothing to zeros. In data parallel
    training every process prunes the same, since parameters and reduced gradients are the same.

    Args:
        model: injected, with dense factors, unmerged. Wrappers such as ``torch.compile`` are looked through.
        config: that of the layers, except that ``total_steps`` may differ.
        optimizer: the one that steps the adapters. Without it, its momentum goes on moving what was pruned,
            and ``step`` sets that to zero each time, which costs a pass over the adapters.
        total_steps: optimizer steps of the run; None takes ``config.total_steps``.

    Raises:
        ValueError: a layer is not as it must be, there is no number of steps, or too few for a pruning.
        TypeError: an argument has the wrong type.

    Memory: with score="magnitude_gradient" a float32 number an entry; at a pruning, scores of all adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SALORConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        total_steps: int | None = None,
    ) -> None:
        layers = dense_layers(_OP, model)
        _check_config(config, layers)
        if optimizer is not None and not hasattr(optimizer, "state"):
            kind = type(optimizer).__name__
            raise TypeError(f"{_OP}: optimizer must be a torch.optim.Optimizer or None, got {kind}")
        total_steps = config.total_steps if total_steps is None else total_steps
        if total_steps is None:
            raise ValueError(f"{_OP}: total_steps must be given here or in config, got None in both")
        check_count(_OP, "total_steps", total_steps)
        self.model, self.config, self.optimizer = model, config, optimizer
        self.total_steps, self.steps = int(total_steps), 0
        # a ratio such as 0.7 is no binary fraction: 0.7 · 10 must be 7
        self.start = math.ceil(config.warmup_ratio * total_steps - _TINY)
        self.end = math.floor(config.end_ratio * total_steps + _TINY)
        if self.start >= self.end:
            raise ValueError(
                f"{_OP}: total_steps must leave a step between warm-up and end, got {total_steps} with the "
                f"warm-up until step {self.start} and the end at step {self.end}"
            )
        self._layers = layers
        self._scores: dict[str, list[Tensor]] = {}

    @property
    def finished(self) -> bool:
        """Whether the masks are final."""
        return self.steps >= self.end

    def progress_at(self, step: int) -> float:
        """Return the share of the final sparsities that is reached after ``step`` steps, in [0, 1]."""
        if step >= self.end:
            return 1.0
        # the last step at which something was pruned
        step = self.start + max(0, step - self.start) // self.config.every * self.config.every
        return 1 - (1 - (step - self.start) / (self.end - self.start)) ** 3

    def step(self) -> None:
        """Count one step of the optimizer, and prune if it is time.

        Call it once after each ``optimizer.step()``, on every process; with score="magnitude_gradient" before
        the gradients are dropped.

        Raises:
            ValueError: a layer is merged or was replaced, or an adapter has another shape, as inside FSDP.
            RuntimeError: score="magnitude_gradient" finds no gradient. The step is then not counted.
        """
        step = self.steps + 1
        uses_gradient = self.config.score == "magnitude_gradient" and step <= self.end
        prunes = self.progress_at(step) > self.progress_at(self.steps)
        if prunes or uses_gradient:
            self._check_layers()
        if uses_gradient:
            self._score_gradients()
        self.steps = step
        if prunes:
            self._prune(self.progress_at(step))
        elif self.optimizer is None:
            self._clear_all()

    def finish(self) -> nn.Module:
        """Return the model with its layers in their compact form, in place: ``compact(model, optimizer)``.

        Possible as soon as the schedule has ``finished``, at ``end_ratio`` of the steps; the optimizer then
        goes on with the parameters that are left.

        Raises:
            RuntimeError: the masks are not final yet.
        """
        if not self.finished:
            raise RuntimeError(
                f"{_OP}.finish: steps must be at least {self.end}, when pruning ends, got {self.steps}; "
                "salor.compact takes the masks as they are"
            )
        model = compact(self.model, self.optimizer)
        self._layers, self._scores = {}, {}
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` resumes from; masks are in the ``state_dict`` of the model."""
        scores = {name: [score.clone() for score in pair] for name, pair in self._scores.items()}
        return {"steps": self.steps, "total_steps": self.total_steps, "scores": scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state`` was saved; load the model and the optimizer by their own.

        Raises:
            ValueError: the state is of another run: its length or its layers differ.
        """
        if state["total_steps"] != self.total_steps:
            expected, actual = self.total_steps, state["total_steps"]
            raise ValueError(f"{_OP}: state must be of a run of {expected} steps, got one of {actual}")
        scores = state["scores"]
        if scores and scores.keys() != self._layers.keys():
            raise ValueError(
                f"{_OP}: state must have scores of the layers of the model, got those of {len(scores)} layers"
            )
        self._scores = {
            name: [score.to(self._layers[name].weight.device, copy=True) for score in pair]
            for name, pair in scores.items()
        }
        self.steps = int(state["steps"])

    def _check_layers(self) -> None:
        current = fused_layers(unwrapped(self.model))
        for name, layer in self._layers.items():
            if current.get(name) is not layer or not isinstance(layer.adapter, SALOR):
                raise ValueError(f"{_OP}: model must have the layers of the start, got another at {name!r}")
            if layer.merged:
                raise ValueError(f"{_OP}: layer {name!r} must not be merged, got merged; unmerge it first")
            for factor, pruned in layer.adapter.pairs():
                if factor.shape != pruned.shape:
                    expected, actual = tuple(pruned.shape), tuple(factor.shape)
                    raise ValueError(
                        f"{_OP}: adapter of {name!r} must be {expected}, got {actual}; FSDP is not supported"
                    )

    @torch.no_grad()
    def _score_gradients(self) -> None:
        adapters = [layer.adapter for layer in self._layers.values()]
        if all(factor.grad is None for adapter in adapters for factor, _ in adapter.pairs()):
            raise RuntimeError(
                f'{_OP}: adapters must have gradients with score="magnitude_gradient", got none; '
                "call step() before zero_grad()"
            )
        for name, layer in self._layers.items():
            pairs = layer.adapter.pairs()
            if name not in self._scores:
                self._scores[name] = [torch.zeros_like(f, dtype=torch.float32) for f, _ in pairs]
            for score, (factor, _) in zip(self._scores[name], pairs, strict=True):
                score.mul_(_DECAY)
                if factor.grad is not None:
                    product = (factor * factor.grad).abs().nan_to_num(nan=0.0, posinf=0.0)
                    score.add_(product, alpha=1 - _DECAY)

    @torch.no_grad()
    def _prune(self, progress: float) -> None:
        config, layers = self.config, list(self._layers.values())
        scores = [self._scores.get(name) or _magnitudes(layer) for name, layer in self._layers.items()]
        a_scores, b_scores = ([pair[i] for pair in scores] for i in (0, 1))
        a_alive, b_alive = ([~layer.adapter.pairs()[i][1] for layer in layers] for i in (0, 1))
        if config.structure == "rank":
            alive = [flags.any(dim=1) for flags in a_alive]
            kept = keep_components(a_scores, b_scores, alive, config.sparsity_a, progress)
            a_kept = [flags[:, None].expand_as(old) for flags, old in zip(kept, a_alive, strict=True)]
            b_kept = [flags.expand_as(old) for flags, old in zip(kept, b_alive, strict=True)]
        else:
            a_kept = keep_entries(config.structure, a_scores, a_alive, config.sparsity_a, progress)
            b_kept = keep_entries(config.structure, b_scores, b_alive, config.sparsity_b, progress)
        for layer, *kept in zip(layers, a_kept, b_kept, strict=True):
            for (factor, pruned), flags in zip(layer.adapter.pairs(), kept, strict=True):
                pruned.copy_(~flags)
                self._clear(factor, pruned)

    def _clear(self, factor: nn.Parameter, pruned: Tensor) -> None:
        tensors = [factor, factor.grad]
        if self.optimizer is not None and factor in self.optimizer.state:
            tensors += self.optimizer.state[factor].values()
        for tensor in tensors:
            # counters and factored moments have other shapes
            if isinstance(tensor, Tensor) and tensor.shape == factor.shape and tensor.is_floating_point():
                tensor.masked_fill_(pruned.to(tensor.device), 0)

    @torch.no_grad()
    def _clear_all(self) -> None:
        if self.steps > self.start:
            adapters = [layer.adapter for layer in self._layers.values()]
            # those of a model that was made compact on the way have nothing to clear
            for adapter in (adapter for adapter in adapters if isinstance(adapter, SALOR)):
                for factor, pruned in adapter.pairs():
                    factor.masked_fill_(pruned, 0)


def densities(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the share of entries of A and of B that are not pruned, of each SALOR layer, by its name.

    Raises:
        ValueError: the model has no SALOR layer, as after ``compact`` with structure="rank".
    """
    check_model("densities", model)
    found = {}
    for name, layer in fused_layers(unwrapped(model)).items():
        adapter = layer.adapter
        if isinstance(adapter, SALOR):
            a, b = (int((~flags).sum()) / max(1, flags.numel()) for _, flags in adapter.pairs())
            found[name] = a, b
        elif adapter.name == "salor":
            found[name] = adapter.a.mask.density, adapter.b.mask.density
    if not found:
        kind = type(model).__name__
        raise ValueError(f"densities: model must have SALOR layers, got a {kind} without")
    return found


def export_peft(
    model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write the adapters of ``model`` as a plain LoRA in PEFT's format, zeros included.

    Args:
        model: injected with a ``SALORConfig``, compact or not.
        folder: made if it does not exist; files of an earlier adapter in it are replaced.
        dtype: of the tensors in the file; None keeps the adapter's, float32 beside a 16-bit base.

    Raises:
        ValueError: the model has no SALOR layers, or those of another method. ValueError, TypeError, OSError:
            as ``save_adapter`` does.
    """
    op = "export_peft"
    check_model(op, model)
    path, inner = folder_path(op, folder), unwrapped(model)
    layers = fused_layers(inner)
    methods = sorted({layer.adapter.name for layer in layers.values()})
    # with structure="rank" the compact form is LoRA's
    if not methods or not {"salor", "lora"}.issuperset(methods):
        raise ValueError(f"{op}: model must have SALOR layers, got {' and '.join(methods) or 'one without'}")
    with torch.no_grad():
        factors = {name: layer.adapter.factors(layer.weight) for name, layer in layers.items()}
    write_lora(op, path, factors, base=getattr(inner, "name_or_path", None) or None, dtype=dtype)


def _magnitudes(layer: FusedLinear) -> list[Tensor]:
    return [factor.detach().abs() for factor, _ in layer.adapter.pairs()]


def _check_config(config: object, layers: Mapping[str, FusedLinear]) -> None:
    if not isinstance(config, SALORConfig):
        raise TypeError(f"{_OP}: config must be a SALORConfig, got {type(config).__name__}")
    for name, layer in layers.items():
        if replace(layer.config, total_steps=config.total_steps) != config:
            raise ValueError(f"{_OP}: config must be that of layer {name!r}, {layer.config}, got {config}")
