"""The four structures of SALOR beside LoRA, on SmolLM2 and Python's own sources.

Trains each with the same seed, windows and learning rate, prunes on the way, and measures the compact model:
held-out loss, parameters, bytes of the adapter file, and a training step before and after.
``python examples/salor_experiment.py``; what it finds is discussed in docs/salor.md. Minutes on a GPU.
"""

import argparse
import dataclasses
import shutil
import time
from datetime import date
from pathlib import Path

import torch
from demo_compare import compare
from demo_model import load_model, load_tokenizer, prepare
from demo_salor import Pruning
from demo_text import stdlib_files, windows
from finetune import BUDGETS, Budget, environment, load_tokens, positive, train, write_results
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.config import MethodConfig

ARMS = ["lora", "unstructured", "2:4", "blocks", "rank"]
# the pictures that the documentation shows
PICTURES = {"unstructured": "salor.png", "rank": "salor_rank.png"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="salor_experiment", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--steps", type=positive, help="30 on a CPU, 200 on a GPU")
    parser.add_argument("--batch", type=positive, help="windows in a step")
    parser.add_argument("--length", type=positive, help="tokens in a window")
    parser.add_argument("--held-out", type=positive, help="windows of held-out text")
    parser.add_argument("--score", choices=["magnitude", "magnitude_gradient"], default="magnitude")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="GGUF or model folder instead of SmolLM2")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files instead of the library")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="folder of the pictures")
    return parser.parse_args(arguments)


def configs(args: argparse.Namespace) -> dict[str, MethodConfig]:
    """Return the arms of the experiment."""
    common = {"r": args.rank, "lora_alpha": 2 * args.rank}

    def config(arm: str) -> MethodConfig:
        if arm == "lora":
            return lo.LoRAConfig(**common)
        return lo.SALORConfig(**common, structure=arm, score=args.score, every=5)

    return {arm: config(arm) for arm in args.arms}


def run_arm(
    name: str,
    config: MethodConfig,
    folder: Path,
    tokens: Tensor,
    held_out: Tensor,
    budget: Budget,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Train one model, and return what it cost and gave."""
    model = load_model(folder, held_out.device, budget.dtype)
    torch.manual_seed(args.seed)
    lo.inject(model, config)
    before = lo.report(model).trainable
    out = args.out / "salor" / name.replace(":", "of")
    out.mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(seed=args.seed, lr=args.lr, out=out)
    begin = time.perf_counter()
    losses, measured = train(
        model, tokens, held_out, budget, options, None if config.method == "lora" else Pruning
    )
    took = time.perf_counter() - begin
    lo.save_adapter(model, out / "adapter", dtype=torch.bfloat16)
    if name in PICTURES:
        shutil.move(out / "salor.png", args.plots / PICTURES[name])
    fresh = lo.inject(load_model(folder, held_out.device, budget.dtype), config)
    batch = windows(tokens, budget.length, budget.batch, seed=args.seed).to(held_out.device)
    costs = compare({"dense": fresh, "in the end": model}, batch, budget.rounds)
    return {
        "trainable_before": before,
        "trainable": lo.report(model).trainable,
        "ranks": dict(lo.report(model).ranks),
        "file_bytes": sum(path.stat().st_size for path in (out / "adapter").iterdir()),
        "train_loss": losses,
        "held_out_loss": measured,
        "seconds": took,
        "costs": {step: dataclasses.asdict(cost) for step, cost in costs.items()},
    }


def table(runs: dict[str, dict]) -> str:
    """Return the table of the documentation."""
    rows = [
        "| | held-out loss | parameters | file, bf16 (kB) | tokens/s, dense | tokens/s, in the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in runs.items():
        last = list(run["held_out_loss"].values())[-1]
        speeds = [f"{cost['tokens_per_second']:,.0f}" for cost in run["costs"].values()]
        size = f"{run['file_bytes'] / 1000:,.0f}"
        rows.append(f"| {name} | {last:.4f} | {run['trainable']:,} | {size} | {' | '.join(speeds)} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    given = {key: getattr(args, key) for key in ("steps", "batch", "length", "held_out")}
    budget = dataclasses.replace(BUDGETS[device.type], **{k: v for k, v in given.items() if v is not None})
    for path in (args.out, args.plots):
        path.mkdir(parents=True, exist_ok=True)
    folder = prepare(args.model)
    tokens, rest = load_tokens(args.text or stdlib_files(), args.seed, load_tokenizer(folder), budget.length)
    held_out = windows(rest, budget.length, budget.held_out).to(device)
    runs = {}
    for name, config in configs(args).items():
        print(f"\n{name}", flush=True)
        runs[name] = run_arm(name, config, folder, tokens, held_out, budget, args)
        print(table({name: runs[name]}).splitlines()[-1], flush=True)
    before = next(iter(runs.values()))["held_out_loss"][0]
    print(f"\nheld-out loss before training: {before:.4f}\n{table(runs)}")
    machine = environment()
    where = "cpu" if machine["gpu"] is None or device.type == "cpu" else "gpu"
    results = {"arguments": vars(args), "budget": dataclasses.asdict(budget), "runs": runs}
    path = args.out / f"salor-{folder.name.split('.')[0].lower()}-{where}-{date.today()}.json"
    write_results(path, {**results, "environment": machine})
    print(f"\nresults are in {path}, pictures in {args.plots}")


if __name__ == "__main__":
    main()
