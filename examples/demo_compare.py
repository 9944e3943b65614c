"""Training steps of two models side by side: tokens per second, and memory on top of the weights."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lowrank_ops as lo
from lowrank_ops.fused_linear import FusedLinear
from lowrank_ops.layer_salor import FusedSALORLinear

__all__ = ["UNFUSED", "Measurement", "compare", "unfuse"]


class UnfusedLoRALinear(nn.Module):
    """The LoRA layer as it is written in stock PyTorch: base, dropout, two small products, scale, sum."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        dropped = F.dropout(x.to(self.a.dtype), self.dropout, self.training)
        return y + (self.scale * F.linear(F.linear(dropped, self.a), self.b)).to(y.dtype)


def unfused_lora(layer: lo.FusedLoRALinear, base: nn.Linear) -> nn.Module:
    a, b, scale = layer.adapter.factors(base.weight)
    return UnfusedLoRALinear(base, a, b, scale, layer.config.lora_dropout)


class UnfusedDenseLoRALinear(nn.Module):
    """The DenseLoRA layer as it is written in stock PyTorch; it trains the parameters of the fused layer."""

    def __init__(self, layer: lo.FusedDenseLoRALinear, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, layer.adapter.scale, layer.config.lora_dropout
        self.encoder, self.core, self.decoder = (
            layer.adapter.encoder,
            layer.adapter.core,
            layer.adapter.decoder,
        )
        self.activation = F.gelu if layer.adapter.activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, p = self.base(x), self.dropout
        h = F.linear(F.dropout(x.to(self.core.dtype), p, self.training), self.encoder)
        h = F.dropout(self.activation(h), p, self.training)
        update = self.activation(F.linear(F.linear(h, self.core), self.decoder))
        return y + (self.scale * F.dropout(update, p, self.training)).to(y.dtype)


def unfused_lori(layer: lo.FusedMaskedLoRALinear, base: nn.Linear) -> nn.Module:
    """Return the usual way: a dense B whose gradient is multiplied by the mask."""
    a, b, scale = layer.adapter.factors(base.weight)
    unfused = UnfusedLoRALinear(base, a, b, scale, layer.config.lora_dropout)
    unfused.a.requires_grad_(False)
    if layer.adapter.is_sparse:
        mask = layer.adapter.b.mask.to_dense()
        unfused.b.register_hook(lambda grad: grad * mask)
    return unfused


def unfused_salor(layer: FusedSALORLinear, base: nn.Linear) -> nn.Module:
    """Return the usual way: dense factors whose gradients are multiplied by the masks."""
    unfused = unfused_lora(layer, base)
    for dense, sparse in ((unfused.a, layer.adapter.a), (unfused.b, layer.adapter.b)):
        dense.register_hook(partial(torch.mul, sparse.mask.to_dense()))
    return unfused


def unfused_salr(layer: lo.FusedPrunedLinear, base: nn.Linear) -> nn.Module:
    """Return the pruned weight as a dense one, and all factors as one pair."""
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    return unfused_lora(layer, base)


# fused layer -> what takes it and a plain layer, and returns the same in stock PyTorch
UNFUSED: dict[type[FusedLinear], Callable[[FusedLinear, nn.Linear], nn.Module]] = {
    lo.FusedLoRALinear: unfused_lora,
    lo.FusedMaskedLoRALinear: unfused_lori,
    FusedSALORLinear: unfused_salor,
    lo.FusedDenseLoRALinear: UnfusedDenseLoRALinear,
    lo.FusedPrunedLinear: unfused_salr,
}


def unfuse(model: nn.Module, fused: dict[str, FusedLinear]) -> nn.Module:
    """Put an unfused layer with the same adapter in the place of each fused one; return the model.

    Args:
        model: a plain model, changed in place.
        fused: name -> layer, in a model of the same architecture; of a class in ``UNFUSED``.
    """
    for name, layer in fused.items():
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, last, UNFUSED[type(layer)](layer, parent.get_submodule(last)))
    return model


@dataclass(frozen=True)
class Measurement:
    """What a training step, forward and backward, costs at its fastest and above the weights' own memory."""

    tokens_per_second: float
    peak_mib: float


def training_step(model: nn.Module, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad(set_to_none=True)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_on_gpu(step: Callable[[], None], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(step: Callable[[], None]) -> int:
    """Add up PyTorch's allocations in the order they happen; a process's peak RSS would only ever rise."""
    # at its own default level the profiler reports its start and stop to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def compare(models: dict[str, nn.Module], tokens: Tensor, rounds: int) -> dict[str, Measurement]:
    """Time a training step of each model, in turns, after a first one each that is not timed."""
    steps = {name: lambda model=model: training_step(model.train(), tokens) for name, model in models.items()}
    peaks = {
        name: peak_on_gpu(step, tokens.device) if tokens.is_cuda else peak_on_cpu(step)
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        # whoever goes first changes from round to round
        for name in list(steps) if turn % 2 else reversed(steps):
            times[name].append(seconds(steps[name]))
    return {name: Measurement(tokens.numel() / min(times[name]), peaks[name] / 2**20) for name in steps}
