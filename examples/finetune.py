"""Fine-tune a real language model through fused adapters, and show what that costs and what it gives.

Base: SmolLM2-135M-Instruct. Text: the standard library's own sources, some files held out, or --text.
Run it with ``make demo``; ``python examples/finetune.py --help`` lists the options.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import textwrap
import time
from pathlib import Path

import torch
from demo_compare import UNFUSED, Measurement, compare, unfuse
from demo_methods import METHODS, Follow
from demo_model import load_model, load_tokenizer, prepare
from demo_plot import plot_losses
from demo_text import split_texts, stdlib_files, tokenise, windows
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

import lowrank_ops as lo
from lowrank_ops.config import MethodConfig
from lowrank_ops.fused_linear import FusedLinear

PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much work suits a device."""

    steps: int
    batch: int  # windows in a step
    length: int  # tokens in a window
    held_out: int  # windows
    rounds: int  # of the comparison
    dtype: torch.dtype  # of the frozen base


BUDGETS = {
    "cpu": Budget(steps=30, batch=1, length=256, held_out=8, rounds=3, dtype=torch.float32),
    "cuda": Budget(steps=200, batch=8, length=1024, held_out=32, rounds=20, dtype=torch.bfloat16),
}


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def rate(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {value}")
    return value


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--steps", type=positive, help="optimiser steps; 30 on a CPU, 200 on a GPU")
    parser.add_argument("--rank", type=positive, help="1 to 512, by the method; with gelora the mean rank")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability, in [0, 1)")
    parser.add_argument("--lr", type=rate, help="largest learning rate of AdamW; by the method")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 files to train on")
    parser.add_argument("--model", type=Path, help="GGUF or model folder instead of SmolLM2")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    method = METHODS[args.method]
    args.lr = method.lr if args.lr is None else args.lr
    args.rank = args.rank or method.rank
    return args


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("finetune: --device cuda needs a GPU that torch can see, got none; use --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Tensor) -> float:
    """Return the mean loss of next-token prediction over (windows, length) tokens, in nats per token."""
    model.eval()
    total = sum(len(part) * model(input_ids=part, labels=part).loss.item() for part in batch.split(4))
    return total / len(batch)


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Tokenizer, device: torch.device) -> str:
    """Return the greedy continuation of the prompt, up to 32 tokens."""
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    output = model.generate(
        **prompt, max_new_tokens=32, do_sample=False, use_cache=True, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def learning_rate(step: int, steps: int, warm_up: int = 4) -> float:
    """Return the share of the largest rate at a step: a line up, then a line down to zero."""
    return min((step + 1) / warm_up, (steps - step) / steps)


def train(
    model: nn.Module,
    tokens: Tensor,
    held_out: Tensor,
    budget: Budget,
    args: argparse.Namespace,
    follow: Follow | None = None,
) -> tuple[list[float], dict[int, float]]:
    """Train the adapter; return the loss of each step, and of held-out text at a few, in nats per token.

    ``follow`` is that of the method, if it has one: see ``demo_methods.Method``.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, budget.steps))
    batches = windows(tokens, budget.length, budget.steps * budget.batch, args.seed).split(budget.batch)
    after_step = None if follow is None else follow(model, optimizer, budget.steps, args)
    losses: list[float] = []
    measured = {0: held_out_loss(model, held_out)}
    check_at = {round(budget.steps * part) for part in (1 / 3, 2 / 3, 1)}
    with tqdm(batches, desc="training", unit="step") as bar:
        for step, batch in enumerate(bar, start=1):
            model.train()
            loss = model(input_ids=(batch := batch.to(held_out.device)), labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if after_step is not None:
                after_step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.item())
            if step in check_at:
                measured[step] = held_out_loss(model, held_out)
            bar.set_postfix(
                loss=f"{losses[-1]:.3f}", held_out=f"{list(measured.values())[-1]:.3f}", refresh=False
            )
    return losses, measured


def check_reload(model: nn.Module, fresh: nn.Module, folder: Path, batch: Tensor) -> float:
    """Load the adapter onto a fresh model and return the largest difference of the two models' logits."""
    lo.load_adapter(fresh, folder)
    with torch.no_grad():
        expected, actual = (one.eval()(input_ids=batch).logits.float() for one in (model, fresh))
    difference = (expected - actual).abs().max().item()
    allowed = torch.finfo(model.dtype).eps * expected.abs().max().item()
    if not difference <= allowed:
        raise SystemExit(
            f"finetune: the reloaded adapter must give the same logits, got a difference of {difference:.2e}"
        )
    return difference


def print_comparison(costs: dict[str, Measurement], budget: Budget, device: torch.device) -> None:
    how = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "torch.profiler"
    print(f"\na training step of {budget.batch} x {budget.length} tokens, the fastest of {budget.rounds};")
    print(f"memory above the weights, by {how}")
    for name, cost in costs.items():
        print(f"  {name:<24}{cost.tokens_per_second:>12,.0f} tokens/s{cost.peak_mib:>12,.0f} MiB peak")


def environment() -> dict[str, object]:
    """Return what a reader of the results needs to know about the machine."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_threads": torch.get_num_threads(),
    }


def write_results(path: Path, results: dict[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def compare_layers(model: nn.Module, folder: Path, batch: Tensor, budget: Budget) -> dict[str, Measurement]:
    """Compare a training step of the model with the same model built of unfused layers."""
    fused = {name: layer for name, layer in model.named_modules() if isinstance(layer, FusedLinear)}
    models = {type(next(iter(fused.values()))).__name__: model}
    if all(type(layer) in UNFUSED for layer in fused.values()):
        models["unfused PyTorch"] = unfuse(load_model(folder, batch.device, budget.dtype), fused)
    return compare(models, batch, budget.rounds)


def load_tokens(files: list[Path], seed: int, tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of (training, held-out) text."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    train_texts, held_out_texts = split_texts(files, seed)
    end = tokenizer.eos_token_id
    return tokenise(train_texts, encode, end, length), tokenise(held_out_texts, encode, end, length)


def check_learning(before: float, after: float, steps: int) -> None:
    print(
        f"held-out loss {before:.4f} -> {after:.4f} nats per token, "
        f"perplexity {math.exp(before):.2f} -> {math.exp(after):.2f}, after {steps} steps"
    )
    if not after < before:
        raise SystemExit(
            f"finetune: training must lower the held-out loss, got {before:.4f} before and {after:.4f} after"
        )


def make_config(args: argparse.Namespace) -> MethodConfig:
    try:
        return METHODS[args.method].config(args)
    except ValueError as error:
        raise SystemExit(f"finetune: {error}") from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"finetune: --out must be a folder that can be written, got {folder}: {error}"
        ) from error


def show_lines(lines: dict[str, str]) -> None:
    print(f"\nprompt\n{textwrap.indent(PROMPT, '  ')}")
    for when, line in lines.items():
        print(f"{when} training\n{textwrap.indent(line.strip(), '  ')}\n")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Do everything that the module's docstring promises and return what was measured."""
    device, config = pick_device(args.device), make_config(args)
    budget = BUDGETS[device.type]
    budget = dataclasses.replace(budget, steps=args.steps or budget.steps)
    make_folder(args.out)
    torch.manual_seed(args.seed)
    folder = prepare(args.model)
    tokenizer = load_tokenizer(folder)
    tokens, rest = load_tokens(args.text or stdlib_files(), args.seed, tokenizer, budget.length)
    held_out = windows(rest, budget.length, budget.held_out).to(device)
    print(f"text: {len(tokens):,} tokens to train on, {len(rest):,} held out; {device}, {budget.dtype}")

    model = load_model(folder, device, budget.dtype)
    lines = {"before": generate(model, tokenizer, device)}
    METHODS[args.method].adapt(model, tokens, config, args)
    losses, measured = train(model, tokens, held_out, budget, args, METHODS[args.method].follow)
    title = f"{folder.name}, {args.method}, rank {args.rank}, {device.type}"
    plot_losses(args.out / "loss.png", losses, measured, title, budget.batch * budget.length)
    check_learning(measured[0], measured[budget.steps], budget.steps)
    lines["after"] = generate(model, tokenizer, device)
    show_lines(lines)

    lo.save_adapter(model, args.out / "adapter")
    difference = check_reload(
        model, load_model(folder, device, budget.dtype), args.out / "adapter", held_out[:1]
    )
    print(f"adapter reloaded onto a fresh model: the largest difference of logits is {difference:.1e}")
    batch = windows(tokens, budget.length, budget.batch, seed=args.seed).to(device)
    costs = compare_layers(model, folder, batch, budget)
    print_comparison(costs, budget, device)
    return {
        "arguments": vars(args),
        "budget": dataclasses.asdict(budget),
        "train_loss": losses,
        "held_out_loss": measured,
        "generated": lines,
        "trainable": lo.report(model).trainable,
        "reload_difference": difference,
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(arguments)
    try:
        results = run(args)
    except KeyboardInterrupt:
        # adapter, plot and results appear by renames, so what is there is whole
        raise SystemExit("finetune: interrupted; files in the output folder are whole") from None
    seconds = time.perf_counter() - started
    write_results(args.out / "results.json", {**results, "environment": environment(), "seconds": seconds})
    print(f"\nadapter, loss.png and results.json are in {args.out}; {seconds:.0f} s")


if __name__ == "__main__":
    main()
