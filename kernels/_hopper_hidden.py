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
from ._hopper_masks import unpack
from ._hopper_sides import _store_hidden


@gluon.jit
def _philox(seed, c0, c1):
    """Philox-4x32-7 at counter (c0, c1, 0, 0), as in dropout_mask."""
    k0 = seed.to(gl.uint32)
    k1 = (seed >> 32).to(gl.uint32)
    c0 = c0.to(gl.uint32)
    c1 = c1.to(gl.uint32)
    c2 = c0 * 0
    c3 = c2
    for _ in gl.static_range(7):
        left = c0.to(gl.uint64) * 0xD2511F53
        right = c2.to(gl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(gl.uint32) ^ c1 ^ k0
        c1 = right.to(gl.uint32)
        c2 = (left >> 32).to(gl.uint32) ^ c3 ^ k1
        c3 = left.to(gl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def _halves(word, least):
    """Ones in each half of an int32 where that half of ``word`` is at least the threshold."""
    low = gl.where((word << 16) >= least, 0xFFFF, 0)
    high = gl.where(word >= least, -65536, 0)
    return low | high


@gluon.jit
def _store_words(bits, words_ptr, pitch, row, word, rows):
    """Write the words of a tile, those of a row by one thread: what is written in parts takes more of L2."""
    WORDS: gl.constexpr = bits.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [gl.num_warps(), 1], [1, 0])
    r = row + gl.arange(0, bits.shape[0], gl.SliceLayout(1, layout))[:, None]
    w = word + gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]
    pointers = words_ptr + r.to(gl.int64) * pitch + w
    bits = gl.convert_layout(bits, layout)
    if word + WORDS <= pitch:
        gl.store(pointers, bits, mask=r < rows)
    else:
        gl.store(pointers, bits, mask=(r < rows) & (w < pitch))


@gluon.jit
def _keep_pairs(
    ROWS: gl.constexpr,
    PAIRS: gl.constexpr,
    layout: gl.constexpr,
    seed,
    least,
    row,
    word,
    rows,
    words_ptr,
    pitch,
):
    """Masks of pairs (ROWS, PAIRS), elements 2i and 2i + 1 of a row; their bits are stored.

    A thread of a tensor-core tile holds columns {2t, 2t + 1} + 8j of 32, which are the eight half-words of
    one call: see _tiles.keep_tile.
    """
    WORDS: gl.constexpr = PAIRS // 16
    SPLIT: gl.constexpr = gl.zeros((ROWS, PAIRS), gl.int32, layout).reshape([ROWS, WORDS, 4, 4]).type.layout
    CALLS: gl.constexpr = gl.SliceLayout(2, SPLIT)
    FLAT: gl.constexpr = gl.SliceLayout(2, CALLS)
    r = row + gl.arange(0, ROWS, gl.SliceLayout(1, FLAT))[:, None]
    w = word + gl.arange(0, WORDS, gl.SliceLayout(0, FLAT))[None, :]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, CALLS)))[None, None, :]
    zero = gl.zeros((ROWS, WORDS, 4), gl.int32, CALLS)
    w0, w1, w2, w3 = _philox(seed, zero + w.expand_dims(2) * 4 + t, zero + r.expand_dims(2))
    m0 = _halves(w0, least)
    m1 = _halves(w1, least)
    m2 = _halves(w2, least)
    m3 = _halves(w3, least)
    # bit 0 of a low half is that of column 2t + 8j, bit 17 of the pair that of its neighbour
    even = (m0 & 0x00020001) | (m1 & 0x02000100)
    odd = (m2 & 0x00020001) | (m3 & 0x02000100)
    bits = ((even | (even >> 16)) & 0x0303) | (((odd << 16) | odd) & 0x03030000)
    _store_words(gl.sum(bits << (2 * t), 2), words_ptr, pitch, row, word, rows)
    # the last join is the fastest index: (0, 2), (1, 3) come out in the order 0, 1, 2, 3
    masks = gl.join(gl.join(m0, m2), gl.join(m1, m3)).reshape([ROWS, WORDS, 4, 4]).permute((0, 1, 3, 2))
    return gl.convert_layout(masks.reshape([ROWS, PAIRS]), layout)


@gluon.jit
def _load_step(
    x, a0, a1, a2, row, k, step, x_bufs, a_bufs, full,
    P: gl.constexpr, SLOTS: gl.constexpr, PANELS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step: a block of x, and the same columns of every factor."""
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.expect(bar, PANELS * (x.block_type.nbytes + P * a0.block_type.nbytes))
    panels = reinterpret(
        a_bufs.index(stage), a0.dtype, [PANELS * SLOTS, a0.block_type.shape[0], 64], a0.layout
    )
    for i in gl.static_range(PANELS):
        tma_load(x, [row, k + 64 * i], bar, x_bufs.index(stage * PANELS + i))
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
        acc = gl.load(pointers, mask=inside, other=0.0)
        for s in range(1, SHARES):
            acc += gl.load(pointers + M.to(gl.int64) * WIDE * s, mask=inside, other=0.0)
    return acc, finished


@gluon.jit
def hopper_hidden_kernel(
    x, a0, a1, a2, hidden_ptr, words_ptr, seed_ptr, shares_ptr, counters_ptr, threshold, pitch, M, K, R, each,
    scale0, scale1, scale2,
    P: gl.constexpr, SLOTS: gl.constexpr, SHARES: gl.constexpr,
    ROWS: gl.constexpr, PANELS: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """h_i = scale_i (mask ∘ x) a_iᵀ side by side, and the mask's bits; i < P projections

    Tensors   descriptors: x (M, K), a_i (R, K); hidden (M, P·R); words (M, pitch) int32; seed (1,) int64;
              shares (SHARES, M, SLOTS·BLOCK_R) float32 scratch, counters a zero for every block of rows,
              both only with more than one share.
    Program   ROWS rows and one share of the columns, ``each`` of them; the last to finish of those that share
              rows adds the shares up in their order, so that the result does not depend on who that is.
    Numerics  16-bit products summed in float32; the mask is that of reference.dropout_keep.
    Traffic   x once, factors once per block of rows (from L2), h and words written once.
    Requires  rows on multiples of 16 bytes; SLOTS·BLOCK_R ≤ 256; each a multiple of 64·PANELS.
    """
    WIDE: gl.constexpr = SLOTS * BLOCK_R
    COLS: gl.constexpr = 64 * PANELS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 16])
    parent: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 8])
    pairs_layout: gl.constexpr = gl.DotOperandLayout(0, parent, 1)
    in_pairs: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    x_bufs = gl.allocate_shared_memory(x.dtype, [STAGES * PANELS, ROWS, 64], x.layout)
    a_bufs = gl.allocate_shared_memory(a0.dtype, [STAGES, WIDE, COLS], a0.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    row = gl.program_id(0) * ROWS
    first = gl.program_id(1) * each
    steps = gl.cdiv(min(each, K - first), COLS)
    seed = gl.load(seed_ptr)
    least = threshold.to(gl.uint32) << 16
    for i in gl.static_range(STAGES - 1):
        if i < steps:
            k = first + i * COLS
            _load_step(x, a0, a1, a2, row, k, i, x_bufs, a_bufs, full, P, SLOTS, PANELS, STAGES)
    acc = gl.zeros((ROWS, WIDE), gl.float32, layout)
    for step in range(steps):
        stage = step % STAGES
        ahead = step + STAGES - 1
        if ahead < steps:
            k = first + ahead * COLS
            _load_step(x, a0, a1, a2, row, k, ahead, x_bufs, a_bufs, full, P, SLOTS, PANELS, STAGES)
        # while the copies are under way
        word = gl.multiple_of((first + step * COLS) // 32, COLS // 32)
        masks = _keep_pairs(ROWS, COLS // 2, pairs_layout, seed, least, row, word, M, words_ptr, pitch)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        tile = reinterpret(x_bufs, gl.int32, [STAGES, ROWS, COLS // 2], in_pairs).index(stage)
        pairs = tile.load(pairs_layout) & masks
        left = unpack(pairs, x.dtype, gl.DotOperandLayout(0, layout, 2))
        acc = warpgroup_mma(left, a_bufs.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        # the buffers are written again in the next step
        thread_barrier()
    if SHARES > 1:
        acc, finished = _shared_sum(
            acc, shares_ptr, counters_ptr + gl.program_id(0), row, M, gl.program_id(1), SHARES
        )
        if finished:
            _store_hidden(acc, hidden_ptr, row, 0, M, R, P * R, scale0, scale1, scale2, BLOCK_R)
    else:
        _store_hidden(acc, hidden_ptr, row, 0, M, R, P * R, scale0, scale1, scale2, BLOCK_R)
