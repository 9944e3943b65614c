"""Triton kernels and their launchers, under the names of their namesakes in ``lowrank_ops.reference``.

Import as ``lowrank_ops.kernels``. 2-D tensors in, tensors out; what a launcher is given was checked by
``lowrank_ops.functional``.
"""

from . import dispatch
from ._config import DeviceFacts, TileConfig, interpreted, pick
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
from .nearest_neighbors import nearest_neighbors

__all__ = [
    "INTERPRETED",
    "DeviceFacts",
    "TileConfig",
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
    "nearest_neighbors",
    "pick",
]

INTERPRETED = interpreted()
