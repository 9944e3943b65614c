"""Triton kernels and their launchers, under the names of their namesakes in ``lowrank_ops.reference``.

Import as ``lowrank_ops.kernels``. 2-D tensors in, tensors out; what a launcher is given was checked by
``lowrank_ops.functional``.
"""

from . import dispatch
from ._config import DeviceFacts, TileConfig, interpreted, pick
from .bitmap_codec import bitmap_decode, bitmap_encode, pruned_decode, two_four_decode, two_four_encode
from .dense_lora import dense_lora_backward, dense_lora_forward
from .lora_backward import (
    lora_backward,
    lora_backward_a,
    lora_backward_b,
    lora_backward_hidden,
    lora_backward_input,
)
from .lora_backward_hidden_b import lora_backward_hidden_b
from .lora_forward import lora_forward, lora_hidden
from .lora_group import lora_group_backward, lora_group_forward
from .masked_lora import masked_lora_backward, masked_lora_forward
from .masked_values import pack_sum, unpack_values
from .nearest_neighbors import nearest_neighbors
from .pruned import pruned_backward, pruned_matmul

__all__ = [
    "INTERPRETED",
    "DeviceFacts",
    "TileConfig",
    "bitmap_decode",
    "bitmap_encode",
    "dense_lora_backward",
    "dense_lora_forward",
    "dispatch",
    "lora_backward",
    "lora_backward_a",
    "lora_backward_b",
    "lora_backward_hidden",
    "lora_backward_hidden_b",
    "lora_backward_input",
    "lora_forward",
    "lora_group_backward",
    "lora_group_forward",
    "lora_hidden",
    "masked_lora_backward",
    "masked_lora_forward",
    "nearest_neighbors",
    "pack_sum",
    "pick",
    "pruned_backward",
    "pruned_decode",
    "pruned_matmul",
    "two_four_decode",
    "two_four_encode",
    "unpack_values",
]

INTERPRETED = interpreted()
