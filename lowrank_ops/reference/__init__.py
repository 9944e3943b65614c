"""The definitions in stock PyTorch: what every kernel computes, under the kernel's own name.

Written to be read: no fusion, dtype of the inputs throughout, 2-D tensors. In float64 these are the
truth that errors are measured from; on a CPU they are what runs. Letters: x (M, K), w (N, K), a (R, K),
b (N, R), h (M, R), y (M, N); a gradient is ``d`` + name. Adapters (a, b, h, dh) may be float32 beside
16-bit x, w and dy: then their products are taken in float32, as PEFT takes them.
"""

from .dense_lora import dense_lora_backward, dense_lora_forward
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
from .masked_lora import masked_lora_backward, masked_lora_forward, pack_sum, unpack_values
from .neighbors import nearest_neighbors
from .pruned import (
    TILE,
    bitmap_decode,
    bitmap_encode,
    pruned_backward,
    pruned_decode,
    pruned_matmul,
    two_four_decode,
    two_four_encode,
)

__all__ = [
    "TILE",
    "bitmap_decode",
    "bitmap_encode",
    "dense_lora_backward",
    "dense_lora_forward",
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
    "masked_lora_backward",
    "masked_lora_forward",
    "nearest_neighbors",
    "pack_sum",
    "philox",
    "pruned_backward",
    "pruned_decode",
    "pruned_matmul",
    "two_four_decode",
    "two_four_encode",
    "unpack_values",
]
