"""Which passes of a layer are left to cuBLAS as a whole: a pure lookup, without a look at each product."""

from functools import lru_cache

import torch

from ._config import device_facts, pick

__all__ = ["is_left"]

# the products of a pass, with what pick is told of them: whether N, and which columns
_FORWARD = (("lora_hidden", False, "K"), ("lora_forward", True, "K"))
_BACKWARD = (
    ("lora_hidden", False, "N"),
    ("lora_backward_hidden_b", True, ""),
    ("lora_backward_a", False, "K"),
    ("lora_backward_a", False, "N"),
    ("lora_backward_input", True, "K"),
)


@lru_cache(maxsize=4096)
def is_left(forward: bool, device: torch.device, M: int, K: int, N: int, R: int, dtype: torch.dtype) -> bool:
    """Whether every product of a pass without dropout, adapters in ``dtype`` too, is left to cuBLAS."""
    facts, columns = device_facts(device), {"K": K, "N": N, "": 0}
    for op, has_n, name in _FORWARD if forward else _BACKWARD:
        if not pick(op, M, N if has_n else 0, columns[name], R, dtype, facts).CUBLAS:
            return False
    if facts.arch != "sm90" or dtype.itemsize > 2:
        return True
    from .hopper_lora import serves

    return not serves(forward, M, K, N, R, facts)
