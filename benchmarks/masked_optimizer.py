"""``python -m benchmarks.masked_optimizer``: AdamW over all sparse adapters of a model, in three forms.

A dense B whose gradient is multiplied by its mask, the compact values of each layer, and the compact values
of all layers as one flat parameter. Shapes are those of Llama-3-8B: seven projections in each of 32 blocks.

``step`` is the optimizer's step, with the multiplication of the gradients where there is one. ``cycle`` is
all between two forward passes but the backward of the layers: a backward pass that hands over given
gradients, which the flat parameter then collects, the step, and ``zero_grad``. ``handover`` is that backward
pass alone, without a flat parameter. Wall clock from an idle device to an idle one, medians; ``graph`` is a
CUDA graph of the same.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lo

from .env import environment, header, slug
from .results import write_atomic

__all__ = ["FORMS", "Form", "main", "measure", "shapes"]

FORMS = ("dense", "compact", "flat")
_OUT_FEATURES = (4096, 1024, 1024, 4096, 14336, 14336, 4096)
_WARMUP = 3


class _Handover(torch.autograd.Function):
    """A scalar of the parameters whose gradients are those given, and take no launch to make."""

    @staticmethod
    def forward(ctx, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        # fresh tensors on the same memory: autograd takes them over and copies nothing
        return None, *[grad.detach() for grad in ctx.grads]


class Form:
    """The trained values of all adapters in one form, and what training does with them after backward.

    Args:
        name: one of ``FORMS``.
        values: the dense B of every layer, (N, R); stand for the gradients too.
        masks: which entries exist, of the same shapes, bool.
        capturable: whether a CUDA graph of the optimizer's step will be made.
    """

    def __init__(
        self, name: str, values: Sequence[Tensor], masks: Sequence[Tensor], capturable: bool = False
    ) -> None:
        is_dense = name == "dense"
        kept = values if is_dense else [v[mask] for v, mask in zip(values, masks, strict=True)]
        self.masks = [mask.to(values[0].dtype) for mask in masks] if is_dense else []
        self.parameters = [nn.Parameter(v.clone()) for v in kept]
        self.grads = [v.clone() for v in kept]
        self.held = self.parameters
        if name == "flat":
            self.held = [lo.flat_parameter(nn.ParameterList(self.parameters))]
        options = {"fused": values[0].is_cuda, "capturable": capturable}
        self.optimizer = torch.optim.AdamW(self.held, lr=1e-3, **options)
        self.handover()

    def handover(self) -> None:
        """Run a backward pass that gives every parameter its gradient."""
        _Handover.apply(self.grads, *self.parameters).backward()

    def step(self) -> None:
        """Take one step with the gradients that are there."""
        if self.masks:
            torch._foreach_mul_([p.grad for p in self.parameters], self.masks)
        self.optimizer.step()

    def cycle(self) -> None:
        """Hand the gradients over, take a step and drop them."""
        self.optimizer.zero_grad()
        self.handover()
        self.step()

    def only_handover(self) -> None:
        """Drop the gradients and hand them over again."""
        self.optimizer.zero_grad()
        self.handover()


def shapes(blocks: int, rank: int, shrink: int = 1) -> list[tuple[int, int]]:
    """Return (N, R) of the B of q, k, v, o, gate, up and down of each block, N divided by ``shrink``."""
    return [(N // shrink, rank) for _ in range(blocks) for N in _OUT_FEATURES]


def measure(sizes: Sequence[tuple[int, int]], sparsity: float, device: str, rounds: int) -> dict[str, object]:
    """Return numbers of values and times, ms, of every form; turns of all are interleaved."""
    generator = torch.Generator(device).manual_seed(0)
    values = [torch.randn(size, generator=generator, device=device) for size in sizes]
    masks = [torch.rand(size, generator=generator, device=device) >= sparsity for size in sizes]
    forms = {name: Form(name, values, masks) for name in FORMS}
    calls = {("handover", "compact"): forms["compact"].only_handover}
    for name, form in forms.items():
        calls["step", name] = form.step
        calls["cycle", name] = form.cycle
        if device == "cuda":
            calls["graph step", name] = _graph(name, values, masks, Form.step)
            calls["graph cycle", name] = _graph(name, values, masks, Form.cycle)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in tqdm(range(rounds + _WARMUP), unit="round"):
        for key, call in calls.items():
            taken = _seconds(call, device)
            if turn >= _WARMUP:
                times[key].append(1e3 * taken)
    ms: dict[str, dict[str, float]] = {}
    for (kind, name), taken in times.items():
        ms.setdefault(kind, {})[name] = statistics.median(taken)
    counts = {name: sum(p.numel() for p in form.held) for name, form in forms.items()}
    over = {kind: {n: row["dense"] / t for n, t in row.items()} for kind, row in ms.items() if "dense" in row}
    return {"tensors": len(sizes), "values": counts, "ms": ms, "times_faster_than_dense": over}


def _graph(
    name: str, values: Sequence[Tensor], masks: Sequence[Tensor], call: Callable[[Form], None]
) -> Callable[[], None]:
    """Return the replay of a CUDA graph of ``call`` of a form of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # on one stream from the start: autograd remembers where a parameter was first used
    with torch.cuda.stream(stream):
        form = Form(name, values, masks, capturable=True)
        for _ in range(_WARMUP):
            call(form)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call(form)

    def replay() -> None:
        # what the graph reads lives as long as it is replayed
        _ = form
        graph.replay()

    return replay


def _seconds(call: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masked_optimizer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divide out_features by this")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="commit to record where the sources lie outside git")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device, args.commit)
    print(header(found))
    row = measure(shapes(args.blocks, args.rank, args.shrink), args.sparsity, device, args.rounds)
    for kind, times in row["ms"].items():
        print(f"{kind:16}", ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"masked_optimizer-{slug(found)}-{found['date']}.json"
    settings = {"blocks": args.blocks, "rank": args.rank, "sparsity": args.sparsity}
    write_atomic(path, json.dumps({"environment": found, **settings, **row}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
