"""LoRI in the demo: a dense B is calibrated for a third of the steps, and its largest tenth trained anew."""

from argparse import Namespace

import torch
from demo_text import windows
from torch import Tensor, nn
from tqdm import tqdm

import lowrank_ops as lo

__all__ = ["SPARSITY", "calibrate_and_sparsify", "density_by_kind", "train_steps"]

SPARSITY = 0.9


def train_steps(
    model: nn.Module, tokens: Tensor, shape: tuple[int, int, int], lr: float, seed: int, label: str
) -> list[float]:
    """Train what requires a gradient, with AdamW and a rate that rises for 4 steps and falls to zero.

    Args:
        model: a language model.
        tokens: the text, one vector.
        shape: steps, windows in a step, tokens in a window.
        lr: the largest learning rate.
        seed: draws the windows.
        label: of the progress bar.

    Returns:
        The loss of each step, in nats per token.
    """
    steps, batch, length = shape
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 4, (steps - step) / steps)
    )
    losses = []
    model.train()
    batches = windows(tokens, length, steps * batch, seed).split(batch)
    for part in tqdm(batches, desc=label, unit="step"):
        part = part.to(device)
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def density_by_kind(masks: dict[str, lo.SparseMask]) -> dict[str, float]:
    """Return the share of entries that ``masks`` keep by kind of projection, as q_proj, in [0, 1]."""
    kinds: dict[str, list[lo.SparseMask]] = {}
    for name, mask in masks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(mask)
    return {
        kind: sum(mask.nnz for mask in own) / sum(mask.shape[0] * mask.shape[1] for mask in own)
        for kind, own in kinds.items()
    }


def calibrate_and_sparsify(model: nn.Module, tokens: Tensor, args: Namespace) -> None:
    """Turn LoRI-D into LoRI-S, with the mask of a short training; say what was kept."""
    steps, batch, length = (66, 8, 1024) if next(model.parameters()).is_cuda else (10, 1, 256)
    steps = steps if args.steps is None else max(1, args.steps // 3)
    train_steps(model, tokens, (steps, batch, length), args.lr, args.seed + 1, "calibrating")
    masks = lo.lori.extract_masks(model, SPARSITY)
    lo.lori.sparsify(model, masks)
    kept, kinds = sum(mask.nnz for mask in masks.values()), density_by_kind(masks)
    shares = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in kinds.items())
    print(f"kept {kept:,} entries of B, {100 - 100 * SPARSITY:.0f} % in all: {shares}")
