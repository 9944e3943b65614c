"""What ``impl="auto"`` runs for a layer with a masked b: a kernel or cuBLAS a pass, as ``pick`` says."""

from collections.abc import Callable

from torch import Tensor

from ._config import device_facts, pick_for
from .masked_lora import MaskedPasses
from .masked_lora import b_parts as triton_b_parts
from .masked_lora import hidden_b_parts as triton_hidden_b_parts

__all__ = ["masked_passes"]

_FEW = 16  # tokens


def b_parts(dy: Tensor, h: Tensor) -> Tensor:
    """See ``masked_lora.b_parts``; of cuBLAS there is one, rounded."""
    config = pick_for("lora_backward_a", dy, h, 0, dy.shape[1], h.shape[1])
    if config.CUBLAS and h.dtype == dy.dtype:
        return (dy.T @ h)[None]
    return triton_b_parts(dy, h)


def whole(dy: Tensor, *rest: object) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """See ``masked_hopper.masked_backward``; None on other architectures."""
    if device_facts(dy.device).arch != "sm90":
        return None
    from .masked_hopper import masked_backward

    return masked_backward(dy, *rest)


def expands(x: Tensor, w: Tensor, R: int) -> bool:
    """Whether y is made of the entries of b: for a few tokens, where a launch more would show."""
    if x.shape[0] > _FEW or x.dtype.itemsize > 2:
        return False
    return not pick_for("lora_forward", x, w, *w.shape, R).CUBLAS


def masked_passes(
    lora_hidden: Callable[[Tensor, Tensor, float, Tensor | None, float], Tensor],
    lora_forward: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    lora_backward_hidden: Callable[[Tensor, Tensor, float], Tensor],
    lora_backward_a: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
    lora_backward_input: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], Tensor],
) -> MaskedPasses:
    """Return the passes, made of those that ``dispatch`` has for ``lora_linear``."""

    def hidden_b_parts(dy: Tensor, b: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if pick_for("lora_backward_hidden_b", dy, b, dy.shape[1], 0, b.shape[1]).CUBLAS:
            return lora_backward_hidden(dy, b, scale), b_parts(dy, h)
        return triton_hidden_b_parts(dy, b, h, scale)

    return MaskedPasses(
        lora_hidden,
        lora_forward,
        lora_backward_hidden,
        lora_backward_a,
        lora_backward_input,
        b_parts,
        hidden_b_parts,
        expands,
        whole,
    )
