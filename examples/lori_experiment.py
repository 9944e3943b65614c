"""LoRA against LoRI with dense and sparse B on SmolLM2: single tasks, two merged into one, one after another.

Tasks: the sources of Python's standard library, and the reference manual that ``pydoc`` shows, as prose.
``python examples/lori_experiment.py``; what it finds is discussed in docs/lori.md. Some minutes on a GPU.
"""

import argparse
import pydoc_data.topics
import random
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from demo_lori import density_by_kind, train_steps
from demo_model import load_model, load_tokenizer, prepare
from demo_text import stdlib_files, tokenise, windows
from finetune import environment, held_out_loss, load_tokens, positive, write_results
from lori_plots import plot_experiment, plot_masks
from torch import Tensor, nn

import lowrank_ops as lo

METHODS = ("lora", "lori-d", "lori-s")
TASKS = ("code", "prose")
# the learning rates that each method is tried with
RATES = {"lora": (5e-4, 1e-3, 2e-3), "lori-d": (1e-3, 2e-3, 5e-3), "lori-s": (5e-3, 1e-2, 2e-2)}


class Task(NamedTuple):
    """Tokens to train on, and held-out windows: to choose by, and to report."""

    train: Tensor
    choice: Tensor
    report: Tensor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lori_experiment", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--rank", type=positive, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=positive, default=120, help="of each training")
    parser.add_argument("--trial-steps", type=positive, default=30, help="of each try of a learning rate")
    parser.add_argument("--batch", type=positive, default=8, help="windows in a step")
    parser.add_argument("--length", type=positive, default=512, help="tokens in a window")
    parser.add_argument(
        "--held-out", type=positive, default=16, help="windows of held-out text, twice a task"
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0], help="of merging")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="GGUF or model folder instead of SmolLM2")
    parser.add_argument("--code", type=Path, nargs="+", help="UTF-8 files instead of the standard library")
    parser.add_argument("--prose", type=Path, nargs="+", help="UTF-8 files instead of the manual")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="folder of the pictures")
    return parser.parse_args(arguments)


def manual(seed: int, tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of (training, held-out) topics of Python's manual, of which a fifth is held out."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(seed).shuffle(topics)
    cut, end = len(topics) // 5, tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    return tokenise(topics[cut:], encode, end, length), tokenise(topics[:cut], encode, end, length)


def load_tasks(args: argparse.Namespace, tokenizer) -> dict[str, Task]:
    texts = {"code": load_tokens(args.code or stdlib_files(), args.seed, tokenizer, args.length)}
    if args.prose:
        texts["prose"] = load_tokens(args.prose, args.seed, tokenizer, args.length)
    else:
        texts["prose"] = manual(args.seed, tokenizer, args.length)
    tasks = {}
    for name, (train, rest) in texts.items():
        half = max(args.length, len(rest) // 2)
        parts = (rest[:half], rest[-half:])
        held_out = (windows(part, args.length, args.held_out).to(args.device) for part in parts)
        tasks[name] = Task(train, *held_out)
    return tasks


class Experiment:
    """One plain model that adapters are put into and taken out of, the tasks, and the results so far."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        folder = prepare(args.model)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.args, self.work = args, work
        self.model = load_model(folder, torch.device(args.device), dtype)
        self.tasks = load_tasks(args, load_tokenizer(folder))
        self.masks: dict[str, dict[str, lo.SparseMask]] = {}
        self.rates: dict[str, float] = {}
        name = folder.name.lower().partition(".")[0]
        self.path = args.out / f"lori-{name}-{args.device}-{date.today()}.json"
        shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        sizes = {name: len(task.train) for name, task in self.tasks.items()}
        self.results = {"arguments": shown, "environment": environment(), "train_tokens": sizes}

    def put(self, key: str, value: object) -> None:
        self.results[key] = value
        write_results(self.path, self.results)

    def config(self, method: str, task: str) -> lo.LoRAConfig | lo.LoRIConfig:
        options = {"r": self.args.rank, "lora_alpha": 2 * self.args.rank}
        if method == "lora":
            return lo.LoRAConfig(**options)
        # each task has an A of its own
        return lo.LoRIConfig(**options, seed=2 * self.args.seed + TASKS.index(task))

    def start(self, method: str, task: str) -> nn.Module:
        """Put fresh adapters into the model; those of LoRI-S with the mask of the task."""
        torch.manual_seed(self.args.seed + TASKS.index(task))
        model = lo.inject(self.model, self.config(method, task))
        return lo.lori.sparsify(model, self.masks[task]) if method == "lori-s" else model

    def train(self, method: str, task: str, steps: int, rate: float) -> list[float]:
        shape = (steps, self.args.batch, self.args.length)
        return train_steps(
            self.model, self.tasks[task].train, shape, rate, self.args.seed, f"{method} on {task}"
        )

    def losses(self, part: str = "report") -> dict[str, float]:
        """Return the held-out loss of each task, in nats per token."""
        return {name: held_out_loss(self.model, getattr(task, part)) for name, task in self.tasks.items()}

    def take_out(self, folder: Path | None = None) -> None:
        """Save the adapters if there is a folder, and leave the model plain."""
        if folder is not None:
            lo.save_adapter(self.model, folder)
        lo.eject(self.model)

    def choose_rate(self, method: str) -> list[dict]:
        """Try the method's learning rates on short runs of the first task; keep the best."""
        tries = []
        for rate in RATES[method]:
            self.start(method, TASKS[0])
            self.train(method, TASKS[0], self.args.trial_steps, rate)
            tries.append({"lr": rate, "loss": self.losses("choice")[TASKS[0]]})
            if method == "lori-d" and tries[-1] == min(tries, key=lambda one: one["loss"]):
                # until LoRI-D has been trained in full, its best try stands in
                self.masks[TASKS[0]] = lo.lori.extract_masks(self.model, self.args.sparsity)
            self.take_out()
        self.rates[method] = min(tries, key=lambda one: one["loss"])["lr"]
        return tries

    def single(self, method: str, task: str) -> dict:
        """Train one adapter on one task."""
        begin = time.perf_counter()
        self.start(method, task)
        trained = lo.report(self.model).trainable
        train_loss = self.train(method, task, self.args.steps, self.rates[method])
        losses = self.losses()
        if method == "lori-d":
            self.masks[task] = lo.lori.extract_masks(self.model, self.args.sparsity)
        self.take_out(self.work / f"{method}-{task}")
        size = sum(path.stat().st_size for path in (self.work / f"{method}-{task}").iterdir())
        seconds = time.perf_counter() - begin
        found = {"method": method, "task": task, "trainable": trained, "held_out_loss": losses}
        return {**found, "file_bytes": size, "train_loss": train_loss, "seconds": seconds}

    def merged(self, method: str, how: str) -> dict:
        """Merge the adapters of both tasks; of the weights, take the best on the windows to choose by."""
        folders, tries = [self.work / f"{method}-{task}" for task in TASKS], []
        for weight in self.args.weights:
            adapter = lo.merge_adapters(folders, [weight] * len(TASKS), how)
            adapter.save(self.work / "merged")
            lo.load_adapter(self.model, self.work / "merged")
            choice = self.losses("choice")
            tries.append({"weight": weight, "choice": sum(choice.values()), "held_out_loss": self.losses()})
            self.take_out()
        best = min(tries, key=lambda one: one["choice"])
        return {"method": method, "merge": how, "weight": best["weight"], "tries": tries, **best}

    def continued(self, method: str) -> dict:
        """Go on from the first task with the second; LoRI-S trains the entries of the second's own mask."""
        first, second = TASKS
        lo.load_adapter(self.model, self.work / f"{method}-{first}")
        before = self.losses()
        if method == "lori-s":
            lo.lori.train_only(self.model, self.masks[second])
        self.train(method, second, self.args.steps, self.rates[method])
        after = self.losses()
        self.take_out()
        return {"method": method, "before": before, "after": after, "forgotten": after[first] - before[first]}

    def mask_shares(self) -> dict[str, object]:
        """Return densities by layer and kind, and how much of one task's mask the other shares."""
        shares = {
            task: {
                "by_layer": {name: mask.density for name, mask in masks.items()},
                "by_kind": density_by_kind(masks),
            }
            for task, masks in self.masks.items()
        }
        one, two = (self.masks[task] for task in TASKS)
        both = sum(one[name].intersection(two[name]).nnz for name in one)
        rows = [torch.diff(mask.offsets) for mask in one.values()]
        return {
            "density": shares,
            "entries": sum(mask.nnz for mask in one.values()),
            "overlap": both / max(1, sum(mask.nnz for mask in one.values())),
            "empty_rows": sum(int((row == 0).sum()) for row in rows) / sum(len(row) for row in rows),
        }


def stages(experiment: Experiment) -> Iterator[tuple[str, object]]:
    """Yield each part of the results as it is done."""
    yield "base", experiment.losses()
    yield "rates", {method: experiment.choose_rate(method) for method in METHODS}
    yield "single", [experiment.single(method, task) for method in METHODS for task in TASKS]
    yield "masks", experiment.mask_shares()
    yield "continual", [experiment.continued(method) for method in METHODS]
    yield "merged", [experiment.merged(method, how) for method in METHODS for how in ("cat", "linear")]


def table(results: dict) -> str:
    """Return the held-out losses as text."""
    lines = [f"{'':<28}{'code':>9}{'prose':>9}"]
    rows = {"base": results["base"]}
    for run in results["single"]:
        rows[f"{run['method']}, {run['task']} alone"] = run["held_out_loss"]
    for run in results["merged"]:
        rows[f"{run['method']}, merged by {run['merge']} ({run['weight']})"] = run["held_out_loss"]
    for run in results["continual"]:
        rows[f"{run['method']}, code then prose"] = run["after"]
    lines += [f"{name:<28}{losses['code']:>9.4f}{losses['prose']:>9.4f}" for name, losses in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    for path in (args.out, args.plots):
        path.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        experiment = Experiment(args, Path(work))
        for key, value in stages(experiment):
            experiment.put(key, value)
    experiment.put("seconds", time.perf_counter() - begin)
    plot_experiment(args.plots / "lori_experiment.png", experiment.results)
    plot_masks(args.plots / "lori_mask.png", experiment.masks[TASKS[0]])
    print(table(experiment.results))
    print(f"written: {experiment.path}, {args.plots / 'lori_experiment.png'}, {args.plots / 'lori_mask.png'}")


if __name__ == "__main__":
    main()
