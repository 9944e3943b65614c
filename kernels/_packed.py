"""What kernels are told of a compressed weight: its tensors, as ``reference.pruned`` names them."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._config import DeviceFacts, tl_type

__all__ = ["PackedArgs", "packed_args"]


class PackedArgs(NamedTuple):
    """``pointers`` are values, bits, offset and start; ``constants`` what ``_compressed`` branches on."""

    pointers: tuple[Tensor, ...]
    across: int
    constants: dict[str, object]


def packed_args(packed: tuple[Tensor, ...], dtype: torch.dtype, facts: DeviceFacts) -> PackedArgs:
    """Return the arguments for a weight whose values are of ``dtype``."""
    two_four = len(packed) == 2
    short = dtype.itemsize == 2
    constants = {
        "TWO_FOUR": two_four,
        "PAIRED": two_four and short,
        "PTX": short and not two_four and facts.arch.startswith("sm"),
        "DTYPE": tl_type(dtype),
    }
    values, bits = packed[:2]
    if two_four:
        return PackedArgs((values, bits, bits, bits), bits.shape[1] * 2, constants)
    return PackedArgs(packed, bits.shape[1], constants)
