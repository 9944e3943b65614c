"""``python -m benchmarks.host_time``: what an eager forward and backward of one layer costs the host.

Few tokens, so that the GPU is never what one waits for, and no synchronisation inside a round. Every layer
takes its turn in every round, because a processor's clock drifts; medians over rounds. With ``--out`` a
JSON file, and beside it as text where the time of the fused layer goes.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_ops import FusedLoRALinear, LoRAConfig

from .env import environment, header
from .results import write_atomic

__all__ = ["main", "measure"]

_CALLS = 20  # a round: short enough that the queue of the GPU never fills up
_WARM_UP = 20
_LINES = 30  # of a profile
_PROFILED = ("ours bf16", "ours fp32", "ours bf16 p=0.05")


def _linear(size: int, device: str) -> nn.Linear:
    return nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)


def _fused(size: int, device: str, dtype: torch.dtype, dropout_p: float) -> nn.Module:
    config = LoRAConfig(r=16, lora_alpha=32, lora_dropout=dropout_p)
    layer = FusedLoRALinear.from_linear(_linear(size, device), config)
    layer.adapter.to(dtype)
    return layer.train()


def _peft(size: int, device: str, fp32: bool, dropout_p: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout_p, target_modules=["0"])
    model = get_peft_model(nn.Sequential(_linear(size, device)), config, autocast_adapter_dtype=fp32)
    return model.get_base_model()[0].train()


def layers(size: int, device: str) -> dict[str, nn.Module]:
    """Return every layer to time, by name."""
    made = {"frozen": _linear(size, device)}
    for p, suffix in ((0.0, ""), (0.05, " p=0.05")):
        made |= {
            f"ours bf16{suffix}": _fused(size, device, torch.bfloat16, p),
            f"ours fp32{suffix}": _fused(size, device, torch.float32, p),
            f"peft bf16{suffix}": _peft(size, device, False, p),
            f"peft fp32{suffix}": _peft(size, device, True, p),
        }
    return made


class Step:
    """Forward, and backward into x and the adapter, of one layer on one input."""

    def __init__(self, layer: nn.Module, M: int, size: int, device: str, autocast: bool = False) -> None:
        self.layer, self.autocast, self.device = layer, autocast, device
        self.x = torch.randn(1, M, size, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.dy = torch.randn(1, M, size, device=device, dtype=torch.bfloat16)
        self.leaves = [self.x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward(self) -> Tensor:
        if not self.autocast:
            return self.layer(self.x)
        with torch.autocast(self.device, torch.bfloat16):
            return self.layer(self.x)

    def round(self) -> tuple[float, float]:
        """Return the host's µs of one forward and of one backward pass."""
        start = time.perf_counter()
        ys = [self.forward() for _ in range(_CALLS)]
        middle = time.perf_counter()
        for y in ys:
            torch.autograd.grad(y, self.leaves, self.dy)
        return (middle - start) / _CALLS * 1e6, (time.perf_counter() - middle) / _CALLS * 1e6


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(tokens: Sequence[int], size: int, device: str, seconds: float) -> list[dict]:
    """Return rows {"layer", "M", "fwd", "bwd", "both", "ratio"}: medians in µs, ratio to the frozen layer."""
    made, rows = layers(size, device), []
    for M in tokens:
        steps = {name: Step(layer, M, size, device) for name, layer in made.items()}
        steps["ours fp32, autocast"] = Step(made["ours fp32"], M, size, device, autocast=True)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for step in steps.values():
            step.round()
        stop = time.perf_counter() + seconds / len(tokens)
        with tqdm(desc=f"M={M}", unit=" rounds") as bar:
            while time.perf_counter() < stop:
                for name, step in steps.items():
                    _wait(device)
                    times[name].append(step.round())
                bar.update()
        frozen = statistics.median(map(sum, times["frozen"]))
        for name, rounds in times.items():
            both = statistics.median(map(sum, rounds))
            fwd, bwd = (statistics.median(column) for column in zip(*rounds, strict=True))
            rows.append({"layer": name, "M": M, "fwd": fwd, "bwd": bwd, "both": both, "ratio": both / frozen})
    return rows


def _profile(call: Callable[[], object], calls: int) -> str:
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        call()
    profile.disable()
    lines = []
    for (path, line, name), (_, count, own, total, _) in pstats.Stats(profile).stats.items():
        place = f"{name}  {Path(path).name}:{line}" if line else name
        lines.append((own / calls * 1e6, total / calls * 1e6, count / calls, place))
    total = sum(line[0] for line in lines)
    text = [f"{total:.0f} µs a call", "   own µs   with what it calls    calls"]
    for own, both, count, place in sorted(lines, reverse=True)[:_LINES]:
        text.append(f"{own:9.1f} {both:19.1f} {count:8.1f}  {place}")
    return "\n".join(text) + "\n"


def breakdown(layer: nn.Module, M: int, size: int, device: str) -> str:
    """Return where the time of a layer goes, as cProfile sees it; its own cost inflates what is short."""
    step = Step(layer, M, size, device)
    calls = 500 if device == "cuda" else 10

    def both() -> None:
        torch.autograd.grad(step.forward(), step.leaves, step.dy)

    parts = []
    for name, call in (("forward", step.forward), ("forward and backward", both)):
        for _ in range(_WARM_UP):
            call()
        _wait(device)
        # on this thread: autograd calls backward on one of its own, where cProfile sees nothing
        with torch.autograd.set_multithreading_enabled(False):
            parts.append(f"{name}, {calls} calls: {_profile(call, calls)}")
    return "\n".join(parts)


def _table(rows: Sequence[dict]) -> str:
    lines = [f"{'layer':22s} {'M':>5s} {'fwd µs':>8s} {'bwd µs':>8s} {'both µs':>8s} {'ratio':>6s}"]
    for row in rows:
        numbers = f"{row['fwd']:8.0f} {row['bwd']:8.0f} {row['both']:8.0f} {row['ratio']:6.2f}"
        lines.append(f"{row['layer']:22s} {row['M']:5d} {numbers}")
    return "\n".join(lines) + "\n"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--size", type=int, default=4096, help="in_features and out_features")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, all together")
    parser.add_argument("--out", type=Path, help="JSON file; the breakdown goes beside it as .txt")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and with ``--out`` write it with the breakdown."""
    args = _parse(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    torch.manual_seed(0)
    rows = measure(args.tokens, args.size, device, args.seconds)
    text = f"{header(found)}\n{_table(rows)}"
    sys.stdout.write(text)
    if args.out:
        made = layers(args.size, device)
        profiles = {name: breakdown(made[name], args.tokens[-1], args.size, device) for name in _PROFILED}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"environment": found, "rows": rows, "profiles": profiles}
        write_atomic(args.out, json.dumps(data, indent=1) + "\n")
        write_atomic(
            args.out.with_suffix(".txt"),
            text + "\n".join(f"{name}, {part}" for name, part in profiles.items()),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
