"""Random matrices that a seed stands for: the same bits on every device, and in every release of torch."""

import hashlib
import math

import torch
from torch import Tensor

from .reference import philox

__all__ = ["draw_uniform", "layer_seed"]

_LOW = 0xFFFFFFFF


def layer_seed(seed: int, name: str) -> int:
    """Return the seed, in [0, 2⁶³), of the layer called ``name`` in a model with ``seed``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_uniform(
    seed: int, rows: int, cols: int, *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return (rows, cols), uniform in ±1/√cols, as ``nn.init.kaiming_uniform_`` with a = √5 draws it.

    Element i of the flattened matrix comes from word i % 4 of Philox-4x32-10 under the key ``seed`` at
    counter i // 4: its upper 24 bits and one half, over 2²³, less 1, times 1/√cols, in float64, rounded to
    float32 and then to ``dtype``. On "meta" nothing is computed.
    """
    if torch.device(device).type == "meta":
        return torch.empty(rows, cols, dtype=dtype, device=device)
    key = torch.tensor([seed], dtype=torch.int64, device=device)
    counters = torch.arange((rows * cols + 3) // 4, device=device)
    words = torch.stack(philox(key, counters & _LOW, counters >> 32, rounds=10), -1).flatten()[: rows * cols]
    unit = ((words >> 8).double() + 0.5) * 2**-23 - 1
    return (unit * (1 / math.sqrt(max(1, cols)))).float().to(dtype).view(rows, cols)
