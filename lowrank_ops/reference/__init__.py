"""The definitions in stock PyTorch: what every kernel computes, under the kernel's own name.

Written to be read: no fusion, dtype of the inputs throughout, 2-D tensors. In float64 these are the
truth that errors are measured from; on a CPU they are what runs. Letters: x (M, K), w (N, K), a (R, K),
b (N, R), h (M, R), y (M, N); a gradient is ``d`` + name. Adapters (a, b, h, dh) may be float32 beside
16-bit x, w and dy: then their products are taken in float32, as PEFT takes them.
"""

from .dropout import dropout_keep, keep_threshold, philox
from .lora import (
    lora_backward,
    lora_backward_a,
    lora_backward_b,
    lora_backward_hidden,
    lora_backward_hidden_b,
    lora_backward_input,
    lora_forward,
    lora_hidden,
)
from .lora_group import lora_group_backward, lora_group_forward
from .neighbors import nearest_neighbors

__all__ = [
    "dropout_keep",
    "keep_threshold",
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
    "philox",
]
