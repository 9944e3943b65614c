"""What pruning SmolLM2 costs in perplexity, what the residual brings back, and what training does: a table.

Arms: the dense model as it is, and with LoRA; the pruned one bare, with the residual, and trained: LoRA
alone, LoRA and a frozen residual, and SALR, whose residual trains too. The same windows, seed and schedule
for all that train. ``python examples/salr_experiment.py``; docs/salr.md discusses what it finds.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from demo_model import load_model, load_tokenizer, prepare
from demo_text import stdlib_files, windows
from finetune import Budget, environment, held_out_loss, load_tokens, positive, train
from gelora_experiment import write_atomic
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.config import MethodConfig


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table: its options, None for the model as it is, and whether it trains."""

    label: str
    config: Callable[[argparse.Namespace], MethodConfig] | None
    trains: bool


def lora(rank: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], lo.LoRAConfig]:
    return lambda args: lo.LoRAConfig(r=rank(args), lora_alpha=2 * rank(args))


def salr(**options: object) -> Callable[[argparse.Namespace], lo.SALRConfig]:
    def make(args: argparse.Namespace) -> lo.SALRConfig:
        given = {"sparsity": args.sparsity, "residual_rank": args.residual_rank, **options}
        return lo.SALRConfig(r=args.rank, lora_alpha=2 * args.rank, **given)

    return make


ARMS = {
    "dense": Arm("dense", None, False),
    "lora": Arm("dense, LoRA", lora(lambda args: args.rank), True),
    "lora_wide": Arm("dense, LoRA of all ranks", lora(lambda args: args.rank + args.residual_rank), True),
    "pruned": Arm("pruned", salr(residual_rank=0), False),
    "residual": Arm("pruned + residual", salr(), False),
    "pruned_lora": Arm("pruned, LoRA", salr(residual_rank=0), True),
    "frozen": Arm("pruned, LoRA + frozen residual", salr(train_residual=False), True),
    "salr": Arm("SALR", salr(), True),
    "residual_2_4": Arm("pruned 2:4 + residual", salr(structure="2:4", sparsity=0.5), False),
    "salr_2_4": Arm("SALR 2:4", salr(structure="2:4", sparsity=0.5), True),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="salr_experiment", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rank", type=positive, default=16, help="of LoRA")
    parser.add_argument("--residual-rank", type=positive, default=64)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch", type=positive, default=1, help="windows in a step")
    parser.add_argument("--length", type=positive, default=256, help="tokens in a window")
    parser.add_argument("--held-out", type=positive, default=8, help="windows of held-out text")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="GGUF or model folder instead of SmolLM2")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files instead of the library")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    return parser.parse_args(arguments)


def linear_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that ``lo.SALRConfig()`` would prune, dense or compressed."""
    report = lo.report(model)
    if report.dense_bytes:
        return report.compressed_bytes
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    return sum(linear.weight.nbytes for linear in linears)


def run_arm(
    arm: Arm, folder: Path, tokens: Tensor, held_out: Tensor, budget: Budget, args: argparse.Namespace
) -> dict[str, object]:
    """Make the model of one arm, train it if it trains, and return what it costs and gives."""
    begin = time.perf_counter()
    model = load_model(folder, held_out.device, budget.dtype)
    torch.manual_seed(args.seed)
    if arm.config is not None:
        config = arm.config(args)
        lo.salr.prune(model, config) if config.method == "salr" else lo.inject(model, config)
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapter." in name)
    if isinstance(arm.config and arm.config(args), lo.SALRConfig) and not arm.trains:
        # LoRA starts as zero: what is not trained need not be stored
        adapters -= sum(args.rank * (m.in_features + m.out_features) for m in pruned_layers(model))
    prepared = time.perf_counter() - begin
    losses, measured = [], {0: held_out_loss(model, held_out)}
    if arm.trains:
        options = argparse.Namespace(seed=args.seed, lr=args.lr)
        losses, measured = train(model, tokens, held_out, budget, options)
    last = list(measured.values())[-1]
    return {
        "label": arm.label,
        "trained": arm.trains,
        "weights_mib": linear_bytes(model) / 2**20,
        "adapter_mib": adapters * budget.dtype.itemsize / 2**20,
        "adapter_parameters": adapters,
        "trainable": lo.report(model).trainable if arm.trains else 0,
        "bits_per_weight": lo.report(model).bits_per_weight or 8 * budget.dtype.itemsize,
        "train_loss": losses,
        "held_out_loss": measured,
        "perplexity": math.exp(last),
        "prepare_seconds": prepared,
        "seconds": time.perf_counter() - begin,
    }


def pruned_layers(model: nn.Module) -> list[lo.FusedPrunedLinear]:
    return [module for module in model.modules() if isinstance(module, lo.FusedPrunedLinear)]


def table(runs: dict[str, dict]) -> str:
    """Return the runs as a table in Markdown; sizes are those of the targeted layers, in the base's dtype."""
    head = "| Model | trained | weights, MiB | adapters, MiB | together | perplexity | held-out loss |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for run in runs.values():
        weights, adapters = run["weights_mib"], run["adapter_mib"]
        loss = list(run["held_out_loss"].values())[-1]
        lines.append(
            f"| {run['label']} | {run['trainable']:,} | {weights:.1f} | {adapters:.1f} | "
            f"{weights + adapters:.1f} | {run['perplexity']:.2f} | {loss:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    budget = Budget(args.steps, args.batch, args.length, args.held_out, 0, dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    folder = prepare(args.model)
    tokens, rest = load_tokens(args.text or stdlib_files(), 0, load_tokenizer(folder), args.length)
    held_out = windows(rest, args.length, args.held_out).to(device)
    results = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "environment": environment(),
        "runs": {},
    }
    stem = f"salr-{folder.name.lower().partition('.')[0]}-{args.device}-{date.today()}"
    for name in args.arms:
        print(ARMS[name].label, flush=True)
        results["runs"][name] = run_arm(ARMS[name], folder, tokens, held_out, budget, args)
        write_atomic(args.out / f"{stem}.json", json.dumps(results, indent=1, default=str) + "\n")
        write_atomic(args.out / f"{stem}.md", table(results["runs"]))
    print(table(results["runs"]))
    print(f"written: {args.out / stem}.json and .md")


if __name__ == "__main__":
    main()
