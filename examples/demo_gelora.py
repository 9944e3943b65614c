"""GeLoRA in the demo: ranks from the geometry of the training text, for what a uniform rank would cost."""

from pathlib import Path

from demo_text import windows
from torch import Tensor, nn

import lowrank_ops as lo

__all__ = ["TARGETS", "gelora_config", "measure_ranks", "uniform_cost"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def uniform_cost(model: nn.Module, rank: int) -> int:
    """Return the parameters of adapters of one rank in all target matrices."""
    return rank * sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    )


def measure_ranks(
    model: nn.Module, tokens: Tensor, config: lo.GeLoRAConfig, length: int, seed: int
) -> lo.gelora.RankSelection:
    """Return a rank a matrix from windows of ``length`` tokens, as many as ``config.max_points``."""
    drawn = windows(tokens, length, config.max_points, seed)
    return lo.gelora.select_ranks(model, drawn.split(32), config, progress=True)


def gelora_config(
    model: nn.Module, tokens: Tensor, uniform: lo.LoRAConfig, seed: int, folder: Path
) -> lo.LoRAConfig:
    """Return LoRA with GeLoRA's ranks for the cost of ``uniform.r``; say and plot how they were found."""
    on_gpu = next(model.parameters()).is_cuda
    points, length = (4096, 128) if on_gpu else (384, 32)
    config = lo.GeLoRAConfig(
        target_modules=TARGETS,
        scale=uniform.scale,
        budget=uniform_cost(model, uniform.r),
        max_points=points,
        lora_dropout=uniform.lora_dropout,
    )
    selection = measure_ranks(model, tokens, config, length, seed)
    print(lo.gelora.report(selection))
    lo.gelora.plot(selection, folder / "ranks.png")
    return config.lora_config(selection)
