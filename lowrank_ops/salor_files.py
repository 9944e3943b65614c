"""What a file holds of a SALOR layer: of A and of B the values that are left, and where they are."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .sparse_mask import SparseMask

__all__ = ["FILE_NAMES", "masks_from_file"]

FILE_NAMES = ("a_values", "a_words", "b_values", "b_words")


def masks_from_file(
    op: str, layer: str, tensors: Mapping[str, Tensor], a_shape: Sequence[int], b_shape: Sequence[int]
) -> tuple[SparseMask, SparseMask]:
    """Return the masks of A, (R, K), and B, (N, R), on the device of the tensors, or raise ValueError."""
    if tensors.keys() != set(FILE_NAMES):
        raise ValueError(
            f"{op}: adapter must hold {', '.join(FILE_NAMES)} of {layer!r}, got {', '.join(sorted(tensors))}"
        )
    masks = []
    for letter, shape in (("a", a_shape), ("b", b_shape)):
        values, words = tensors[f"{letter}_values"], tensors[f"{letter}_words"]
        try:
            mask = SparseMask.from_words(words, tuple(shape))
        except (TypeError, ValueError) as error:
            reason = str(error).partition(": ")[2]
            raise ValueError(
                f"{op}: {letter}_words of {layer!r} must be a mask, got an error: {reason}"
            ) from error
        if tuple(values.shape) != (mask.nnz,) or not values.is_floating_point():
            raise ValueError(
                f"{op}: {letter}_values of {layer!r} must be {mask.nnz} floating-point numbers, "
                f"got {values.dtype} of {tuple(values.shape)}"
            )
        masks.append(mask)
    return masks[0], masks[1]
