"""What launches cost by a model, without a GPU: products in waves of tiles, sums in rounds of programs."""

from collections.abc import Sequence

from triton import cdiv

__all__ = [
    "cublas_time",
    "few_tiles",
    "fills",
    "hopper_time",
    "loses",
    "plain_time",
    "split_in_rounds",
    "triton_time",
    "update_time",
]

# rows and columns of cuBLAS's tiles
_CUBLAS = (
    (64, 128), (128, 64), (128, 96), (192, 64), (128, 128), (192, 96), (128, 192), (192, 128), (128, 224),
    (128, 256), (256, 128), (192, 192),
)  # fmt: skip
# microseconds, measured on one H100: a step of 64 of a tile's sum, beside its elements and for each of them,
# what a wave costs beside its steps, and the launch
_STEP, _ELEMENT, _WAVE, _LAUNCH = 0.02, 1.95e-5, 1.2, 1.5
# a step of a tile of 128 x 256 in the kernel for Hopper, and in Triton, where smaller ones cost this power of
# their part of it; beside the steps of a wave
_HOPPER, _TRITON, _SMALLER, _START = 0.66, 0.74, 0.68, 1.5
# bytes a microsecond through device memory; of an update, which it costs so much beside, through the cache
# while they are so many, and of those above
_BYTES, _UPDATE, _CACHE_BYTES, _CACHED, _UPDATE_BYTES = 3.0e6, 2.0, 4.5e6, 35e6, 1.7e6
# the part of the multiprocessors that must have a tile, over all waves
_FILLED = 0.7
# the part of the time of cuBLAS and an update within which a product must be by the model
_SURE = 0.95


def fills(tiles: int, processors: int) -> bool:
    """Whether so many tiles keep the multiprocessors busy: the last wave has not too few."""
    return tiles >= _FILLED * cdiv(tiles, processors) * processors > 0


def gemm_time(
    tile: tuple[int, int], step: float, start: float, M: int, cols: int, depth: int, processors: int
) -> float:
    """Return the time of an (M, cols) product of 16-bit numbers in tiles of one size, one a processor."""
    waves = cdiv(cdiv(M, tile[0]) * cdiv(cols, tile[1]), processors)
    return max(waves * (cdiv(depth, 64) * step + start), 2 * (M * (depth + cols) + depth * cols) / _BYTES)


def cublas_time(M: int, cols: int, depth: int, processors: int) -> float:
    """Return the time of a plain product by the tiles that suit it best."""
    return _LAUNCH + min(
        gemm_time((m, n), _STEP + _ELEMENT * m * n, _WAVE, M, cols, depth, processors)
        for m, n in (_CUBLAS if M > 64 else _CUBLAS[:1])
    )


def triton_time(tile: tuple[int, int], M: int, cols: int, depth: int, processors: int) -> float:
    """Return the time of the portable kernel that makes the update too."""
    step = _TRITON * (tile[0] * tile[1] / 32768) ** _SMALLER
    return gemm_time(tile, step, _START, M, cols, depth, processors)


def hopper_time(M: int, cols: Sequence[int], depths: Sequence[int], processors: int) -> float:
    """Return the time of the kernel for Hopper that makes updates too, of several columns or depths.

    An update is a step more, or two.
    """
    waves = cdiv(cdiv(M, 128) * sum(cdiv(own, 256) for own in cols), processors)
    return waves * (sum(cdiv(depth, 64) + 1 for depth in depths) * _HOPPER + _START)


def update_time(M: int, cols: int) -> float:
    """Return what a launch takes that adds the update to an (M, cols) product: it reads and writes it."""
    size = 4 * M * cols
    return _UPDATE + min(size, _CACHED) / _CACHE_BYTES + max(size - _CACHED, 0) / _UPDATE_BYTES


def plain_time(M: int, cols: Sequence[int], depths: Sequence[int], processors: int) -> float:
    """Return the time of cuBLAS's products of all columns and depths, with an update to each."""
    each = [(M, own, depth) for own in cols for depth in depths]
    return sum(cublas_time(*sizes, processors) + update_time(*sizes[:2]) for sizes in each)


def few_tiles(forward: bool, M: int, cols: int, R: int, processors: int) -> bool:
    """Whether there are so few tiles that many ranks cost more in a product than in a pass of their own.

    Or backward, of a few tokens, too few programs or on some multiprocessors many more than on others; one
    each still hides the launch that an update of few ranks takes.
    """
    if M > 16:
        return R > 32 and M * cols <= 2**21
    programs = cdiv(cols, 32)
    uneven = programs < 0.9 * cdiv(programs, processors) * processors
    return not forward and uneven and (R > 32 or programs > processors)


def loses(tile: tuple[int, int], M: int, cols: int, depth: int, processors: int) -> bool:
    """Whether tiles leave so many multiprocessors idle that cuBLAS and an update of its own are faster."""
    if M <= 16:
        return False
    apart = plain_time(M, (cols,), (depth,), processors)
    busy = fills(cdiv(M, tile[0]) * cdiv(cols, tile[1]), processors)
    return not busy or triton_time(tile, M, cols, depth, processors) > _SURE * apart


def split_in_rounds(blocks: int, out: int, depth: int, steps: int, processors: int) -> int:
    """Return how many programs share a sum of ``steps`` blocks where a multiprocessor runs two at a time.

    What counts is rounds of programs: one of half the programs or fewer takes about two thirds of a full one.
    A part, ``out`` elements of sums over ``depth``, is written and read again.
    """

    def cost(split: int) -> float:
        rounds, left = divmod(blocks * split, 2 * processors)
        last = 0 if not left else 0.65 if left <= processors else 1
        return (rounds + last) / split + (split > 1) * (0.05 + 1.3e-4 * split * out / depth)

    return min(range(1, max(1, min(steps, 8)) + 1), key=cost)
