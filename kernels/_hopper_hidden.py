"""Hopper: the hidden factor of a layer with dropout, and the bits of its mask, in one pass over x."""

from ._gluon import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ._hopper_draw import begin, draw_words, spread_words
from ._hopper_masks import unpack
from ._hopper_sides import _store_hidden


@gluon.jit
def _load_step(
    x, a0, a1, a2, row, k, step, x_bufs, a_bufs, full,
    P: gl.constexpr, SLOTS: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step: a block of x, and the same columns of every factor."""
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.expect(bar, PANELS * (x.block_type.nbytes + P * a0.block_type.nbytes))
    boxes = reinterpret(x_bufs.index(stage), x.dtype, [PANELS] + x.block_type.shape, x.layout)
    panels = reinterpret(
        a_bufs.index(stage), a0.dtype, [PANELS * SLOTS, a0.block_type.shape[0], 64], a0.layout
    )
    for i in gl.static_range(PANELS):
        tma_load(x, [row, k + 64 * i], bar, boxes.index(i))
        tma_load(a0, [0, k + 64 * i], bar, panels.index(i * SLOTS))
        if P > 1:
            tma_load(a1, [0, k + 64 * i], bar, panels.index(i * SLOTS + 1))
        if P > 2:
            tma_load(a2, [0, k + 64 * i], bar, panels.index(i * SLOTS + 2))


@gluon.jit
def _shared_sum(acc, shares_ptr, counter_ptr, row, M, share, SHARES: gl.constexpr):
    """Return (acc summed over all shares, whether this program is the last of them)."""
    layout: gl.constexpr = acc.type.layout
    WIDE: gl.constexpr = acc.shape[1]
    rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, WIDE, gl.SliceLayout(0, layout))[None, :]
    pointers = shares_ptr + rows.to(gl.int64) * WIDE + cols
    inside = (rows < M) & (cols < WIDE)
    gl.store(pointers + M.to(gl.int64) * WIDE * share, acc, mask=inside)
    thread_barrier()
    finished = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SHARES - 1
    if finished:
        if SHARES == 2:
            # the same in either order
            acc += gl.load(pointers + M.to(gl.int64) * WIDE * (1 - share), mask=inside, other=0.0)
        else:
            acc = gl.load(pointers, mask=inside, other=0.0)
            for s in range(1, SHARES):
                acc += gl.load(pointers + M.to(gl.int64) * WIDE * s, mask=inside, other=0.0)
    return acc, finished


@gluon.jit(do_not_specialize=["threshold"])
def hopper_hidden_kernel(
    x, a0, a1, a2, hidden_ptr, words_ptr, seed_ptr, shares_ptr, counters_ptr, threshold, pitch, M, K, R, each,
    scale0, scale1, scale2,
    P: gl.constexpr, SLOTS: gl.constexpr, SHARES: gl.constexpr,
    ROWS: gl.constexpr, PANELS: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """h_i = scale_i (mask ∘ x) a_iᵀ side by side, and the mask's bits; i < P projections

    Tensors   descriptors: x (M, K), a_i (R, K); hidden (M, P·R); words (M, pitch) int32;
              seed (1,) int64; shares (SHARES, M, SLOTS·BLOCK_R) float32 scratch, counters a zero for every
              block of rows, both only with more than one share.
    Program   ROWS rows and one share of the columns, ``each`` of them; the last to finish of those that share
              rows adds the shares up in their order, so that the result does not depend on who that is.
    Numerics  16-bit products summed in float32; the mask is that of reference.dropout_keep.
    Traffic   x once, factors once per block of rows (from L2), h and words written once.
    Requires  rows on multiples of 16 bytes; SLOTS·BLOCK_R ≤ 256; each a multiple of 64·PANELS; PANELS 1
              or 2.
    """
    WIDE: gl.constexpr = SLOTS * BLOCK_R
    COLS: gl.constexpr = 64 * PANELS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 16])
    parent: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 8])
    pairs_layout: gl.constexpr = gl.DotOperandLayout(0, parent, 1)
    in_pairs: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    x_bufs = gl.allocate_shared_memory(x.dtype, [STAGES, PANELS * ROWS, 64], x.layout)
    a_bufs = gl.allocate_shared_memory(a0.dtype, [STAGES, WIDE, COLS], a0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    row = gl.program_id(0) * ROWS
    first = gl.program_id(1) * each
    steps = gl.cdiv(min(each, K - first), COLS)
    seed = gl.load(seed_ptr)
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            k = first + i * COLS
            _load_step(x, a0, a1, a2, row, k, i, x_bufs, a_bufs, full, P, SLOTS, PANELS, STAGES)
    acc = gl.zeros((ROWS, WIDE), gl.float32, layout)
    begun = begin(ROWS, COLS // 2, pairs_layout, seed, row)
    for step in range(steps):
        stage = step % STAGES
        ahead = step + STAGES - 1
        if ahead < steps:
            k = first + ahead * COLS
            _load_step(x, a0, a1, a2, row, k, ahead, x_bufs, a_bufs, full, P, SLOTS, PANELS, STAGES)
        # while the copies are under way
        word = (first + step * COLS) // 32
        words = draw_words(seed, threshold, begun, word, M, words_ptr, pitch)
        masks = spread_words(words, ROWS, COLS // 2, pairs_layout)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        tile = reinterpret(x_bufs, gl.int32, [STAGES, ROWS, COLS // 2], in_pairs).index(stage)
        pairs = tile.load(pairs_layout) & masks
        left = unpack(pairs, x.dtype, gl.DotOperandLayout(0, layout, 2))
        acc = warpgroup_mma(left, a_bufs.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        # the buffers are written again in the next step
        thread_barrier()
    finished = True
    if SHARES > 1:
        acc, finished = _shared_sum(
            acc, shares_ptr, counters_ptr + gl.program_id(0), row, M, gl.program_id(1), SHARES
        )
    if finished:
        _store_hidden(acc, hidden_ptr, row, 0, M, R, P * R, scale0, scale1, scale2, BLOCK_R)
