"""GeLoRA against one uniform rank at the same number of parameters, on SmolLM2 and Python's own sources.

Measures the intrinsic dimension of the hidden states of the pretrained model on the training text, turns it
into ranks, and trains both models with the same seeds, windows, learning rate and scale. About 20 minutes on
two CPU cores. ``python examples/gelora_experiment.py``; what it finds is discussed in docs/gelora.md.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from demo_gelora import TARGETS, measure_ranks, uniform_cost
from demo_model import load_model, load_tokenizer, prepare
from demo_text import stdlib_files, windows
from finetune import Budget, environment, load_tokens, positive, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lo

SCALE = 2.0
COLORS = {"uniform": "#1d4ed8", "gelora": "#c2410c"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gelora_experiment", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rank", type=positive, default=8, help="the uniform rank, which sets the budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch", type=positive, default=1, help="windows in a step")
    parser.add_argument("--length", type=positive, default=256, help="tokens in a window")
    parser.add_argument("--held-out", type=positive, default=8, help="windows of held-out text")
    parser.add_argument("--points", type=positive, default=768, help="windows that dimensions come from")
    parser.add_argument("--point-length", type=positive, default=32, help="tokens in each of these")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--model", type=Path, help="GGUF or model folder instead of SmolLM2")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=None, help="UTF-8 files instead of the library"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="folder of the pictures")
    return parser.parse_args(arguments)


def write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plot_losses(path: Path, runs: list[dict]) -> None:
    """Write a PNG of the held-out loss of each run over its steps, and of the ends seed by seed."""
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for run in runs:
        steps, losses = [int(step) for step in run["held_out_loss"]], list(run["held_out_loss"].values())
        left.plot(steps, losses, color=COLORS[run["arm"]], marker="o", alpha=0.7)
        right.scatter(run["seed"], losses[-1], color=COLORS[run["arm"]], zorder=3)
    for arm, color in COLORS.items():
        left.plot([], [], color=color, marker="o", label=arm)
    left.set(xlabel="step", ylabel="held-out loss (nats per token)")
    left.legend(frameon=False)
    right.set(xlabel="seed", ylabel="held-out loss at the end")
    right.set_xticks(sorted({run["seed"] for run in runs}))
    right.ticklabel_format(axis="y", useOffset=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def run_arm(
    folder: Path,
    config: lo.LoRAConfig,
    tokens: Tensor,
    held_out: Tensor,
    budget: Budget,
    seed: int,
    lr: float,
) -> dict:
    """Train one model and return what it cost and gave."""
    begin = time.perf_counter()
    model = load_model(folder, held_out.device, budget.dtype)
    torch.manual_seed(seed)
    lo.inject(model, config)
    losses, measured = train(model, tokens, held_out, budget, argparse.Namespace(seed=seed, lr=lr))
    return {
        "trainable": lo.report(model).trainable,
        "train_loss": losses,
        "held_out_loss": measured,
        "seconds": time.perf_counter() - begin,
    }


def summary(runs: list[dict]) -> dict[str, object]:
    """Return the mean and spread of the last held-out loss of each arm, and the paired differences."""
    last = {arm: [list(r["held_out_loss"].values())[-1] for r in runs if r["arm"] == arm] for arm in COLORS}
    differences = [g - u for g, u in zip(last["gelora"], last["uniform"], strict=False)]
    found = {
        arm: {
            "mean": statistics.fmean(values),
            "stdev": statistics.stdev(values) if len(values) > 1 else None,
        }
        for arm, values in last.items()
        if values
    }
    return found | {"gelora_minus_uniform": differences}


def choose_ranks(model: nn.Module, tokens: Tensor, args: argparse.Namespace) -> tuple[dict, dict]:
    """Return the configs of both arms, and what was measured on the way; plot the ranks."""
    cost = uniform_cost(model, args.rank)
    config = lo.GeLoRAConfig(target_modules=TARGETS, scale=SCALE, budget=cost, max_points=args.points)
    begin = time.perf_counter()
    selection = measure_ranks(model, tokens, config, args.point_length, 0)
    seconds = time.perf_counter() - begin
    print(lo.gelora.report(selection))
    lo.gelora.plot(selection, args.plots / "gelora_ranks.png")
    arms = {
        "uniform": lo.LoRAConfig(r=args.rank, lora_alpha=SCALE * args.rank, target_modules=TARGETS),
        "gelora": config.lora_config(selection),
    }
    return arms, dataclasses.asdict(config) | {
        "dimensions": selection.dimensions,
        "rule_ranks": lo.gelora.block_ranks(selection.dimensions),
        "ranks": selection.block_ranks,
        "parameters": selection.parameters,
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    budget = Budget(args.steps, args.batch, args.length, args.held_out, 0, dtype)
    for path in (args.out, args.plots):
        path.mkdir(parents=True, exist_ok=True)
    folder = prepare(args.model)
    tokens, rest = load_tokens(args.text or stdlib_files(), 0, load_tokenizer(folder), args.length)
    held_out = windows(rest, args.length, args.held_out).to(device)
    arms, geometry = choose_ranks(load_model(folder, device, dtype), tokens, args)
    results = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "environment": environment(),
        "geometry": geometry,
        "runs": [],
    }
    name = folder.name.lower().partition(".")[0]
    path = args.out / f"gelora-{name}-{args.device}-{date.today()}.json"
    for seed, arm in tqdm([(seed, arm) for seed in args.seeds for arm in arms], unit="run"):
        run = run_arm(folder, arms[arm], tokens, held_out, budget, seed, args.lr)
        results["runs"].append({"arm": arm, "seed": seed, **run})
        results["summary"] = summary(results["runs"])
        write_atomic(path, json.dumps(results, indent=1, default=str) + "\n")
    plot_losses(args.plots / "gelora.png", results["runs"])
    print(json.dumps(results["summary"], indent=1))
    print(f"written: {path}, {args.plots / 'gelora_ranks.png'}, {args.plots / 'gelora.png'}")


if __name__ == "__main__":
    main()
