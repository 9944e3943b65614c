"""Hopper: the roles that compute, for the launch whose roles that copy are in _hopper_gemm."""

from ._gluon import (
    boxes_from,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ._hopper_gemm import (
    _backward_producer,
    _forward_producer,
    _gemm_end,
    _side_backward_producer,
    _side_forward_producer,
    _store_of,
    _tile_at,
)
from ._hopper_masks import load_words, pair_masks, round_to_pairs, unpack
from ._hopper_sides import _side_backward, _side_forward


@gluon.jit
def _accumulate(left, right, acc, use_acc, step, first, empty, STAGES: gl.constexpr):
    """Start one product; with one in flight, the stage before it is free again."""
    acc = warpgroup_mma(left, right, acc, use_acc=use_acc, is_async=True)
    acc = warpgroup_mma_wait(1, (acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=first == 0)
    return acc


@gluon.jit
def _gemm_consumer(
    out0, out1, out2, hid, rank_desc, l_bufs, r_bufs, y_buf, empty, full,
    bias0, bias1, bias2, words_ptr, pitch, M, N0, N1, N2, K, R,
    FORWARD: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr,
    SIDES: gl.constexpr, P: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    if FORWARD:
        c0, c1, c2 = gl.cdiv(N0, BLOCK_N), gl.cdiv(N1, BLOCK_N), gl.cdiv(N2, BLOCK_N)
        base_steps = gl.cdiv(K, BLOCK_K)
        rank_steps = gl.cdiv(R, hid.block_type.shape[1])
    else:
        c0, c1, c2 = gl.cdiv(K, BLOCK_N), 0, 0
        base_steps = gl.cdiv(N0, BLOCK_K) + gl.cdiv(N1, BLOCK_K) + gl.cdiv(N2, BLOCK_K)
        rank_steps = gl.cdiv(R, hid.block_type.shape[1]) * P
    OUTS: gl.constexpr = P if FORWARD else 1
    tiles_m = gl.cdiv(M, BLOCK_M)
    step = 0
    end = _gemm_end(tiles_m * (c0 + c1 + c2), SIDES)
    for tile in range(gl.program_id(0) - SIDES, end, gl.num_programs(0) - SIDES):
        row, col, which = _tile_at(tile, tiles_m, c0, c1, c2, GROUP_M, OUTS)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        if BIAS:
            bias_ptr, cols = bias0, N0
            if P > 1:
                if which == 1:
                    bias_ptr, cols = bias1, N1
            if P > 2:
                if which == 2:
                    bias_ptr, cols = bias2, N2
            offs = col * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + offs, mask=offs < cols, other=0.0).to(gl.float32)[None, :]
        for k in range(base_steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            right = r_bufs.index(stage)
            if FORWARD:
                right = right.permute((1, 0))
            acc = _accumulate(l_bufs.index(stage), right, acc, (k > 0) | BIAS, step, k == 0, empty, STAGES)
            step += 1
        if DROP:
            # a dropped element of dx keeps the sum as it is here
            acc = warpgroup_mma_wait(0, (acc,))
            before = round_to_pairs(acc, out0.dtype)
            words = load_words(before, words_ptr, pitch, row * BLOCK_M, M, col * (BLOCK_N // 32))
        for _ in range(rank_steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            left = reinterpret(l_bufs.index(stage), hid.dtype, hid.block_type.shape, hid.layout)
            right = reinterpret(
                r_bufs.index(stage), rank_desc.dtype, rank_desc.block_type.shape, rank_desc.layout
            )
            if FORWARD:
                right = right.permute((1, 0))
            acc = _accumulate(left, right, acc, True, step, False, empty, STAGES)
            step += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        # y_buf may still be on its way out from the tile before
        tma_store_wait(0)
        if DROP:
            kept = pair_masks(before, words)
            pairs = (round_to_pairs(acc, out0.dtype) & kept) | (before & ~kept)
            y_buf.store(unpack(pairs, out0.dtype, layout))
        else:
            y_buf.store(acc.to(out0.dtype))
        fence_async_shared()
        _store_of(out0, out1, out2, which, row * BLOCK_M, col * BLOCK_N, y_buf, OUTS)
    tma_store_wait(0)


@gluon.jit
def _copy_role(
    big0, big1, big2, w0, w1, w2, s0, s1, s2, rank0, rank1, rank2, hid, kept,
    l_bufs, r_bufs, y_buf, empty, full, flags_ptr, M, N0, N1, N2, K, R,
    FORWARD: gl.constexpr, DB: gl.constexpr, SIDES: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr,
    GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    if FORWARD:
        if SIDES > 0:
            factors = reinterpret(
                l_bufs, s0.dtype, [RING, SLOTS * s0.block_type.shape[0], SIDE_COLS], s0.layout
            )
            _side_forward_producer(
                big0, s0, s1, s2, factors, r_bufs, empty, full, M, K,
                SIDES, P, SLOTS, SIDE_ROWS, SIDE_COLS, RING,
            )  # fmt: skip
        _forward_producer(
            big0, w0, w1, w2, rank0, rank1, rank2, hid, l_bufs, r_bufs, empty, full, flags_ptr,
            M, N0, N1, N2, K, R, SIDES, P, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, SIDE_ROWS, STAGES,
        )  # fmt: skip
    else:
        if SIDES > 0:
            _side_backward_producer(
                big0, big1, big2, s0, s1, s2, kept, l_bufs, r_bufs, y_buf, empty, full, M, N0, N1, N2, R,
                DB, SIDES, P, SIDE_ROWS, SIDE_COLS, STAGES,
            )  # fmt: skip
        _backward_producer(
            big0, big1, big2, w0, w1, w2, rank0, rank1, rank2, hid, l_bufs, r_bufs, empty, full, flags_ptr,
            M, N0, N1, N2, K, R, SIDES, P, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, SIDE_ROWS, STAGES,
        )  # fmt: skip


@gluon.jit
def _compute_role(
    big0, s0, rank0, out0, out1, out2, hid, kept, l_bufs, r_bufs, y_buf, empty, full,
    bias0, bias1, bias2, hidden_ptr, flags_ptr, words_ptr, parts_ptr, entries_ptr, starts_ptr,
    entries, pitch, M, N0, N1, N2, K, R, scale0, scale1, scale2,
    FORWARD: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr, DB: gl.constexpr,
    ENTRIES: gl.constexpr, SIDES: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    if SIDES > 0:
        if FORWARD:
            factors = reinterpret(l_bufs, s0.dtype, [RING, SLOTS * BLOCK_R, SIDE_COLS], s0.layout)
            _side_forward(
                big0, s0, factors, r_bufs, empty, full, hidden_ptr, flags_ptr, words_ptr, pitch,
                M, K, R, scale0, scale1, scale2, DROP,
                SIDES, P, SLOTS, BLOCK_R, SIDE_ROWS, SIDE_COLS, RING,
            )  # fmt: skip
        else:
            _side_backward(
                big0, s0, kept, l_bufs, r_bufs, y_buf, empty, full, hidden_ptr, flags_ptr, parts_ptr,
                entries_ptr, starts_ptr, entries, M, N0, N1, N2, R, scale0, scale1, scale2,
                DB, ENTRIES, SIDES, P, BLOCK_R, SIDE_ROWS, SIDE_COLS, STAGES,
            )  # fmt: skip
    _gemm_consumer(
        out0, out1, out2, hid, rank0, l_bufs, r_bufs, y_buf, empty, full,
        bias0, bias1, bias2, words_ptr, pitch, M, N0, N1, N2, K, R,
        FORWARD, BIAS, (not FORWARD) and DROP, SIDES, P, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip


@gluon.jit
def hopper_kernel(
    big0, big1, big2, w0, w1, w2, s0, s1, s2, rank0, rank1, rank2, out0, out1, out2, hid, kept,
    bias0, bias1, bias2, hidden_ptr, flags_ptr, words_ptr, parts_ptr, entries_ptr, starts_ptr,
    entries, pitch, M, N0, N1, N2, K, R, scale0, scale1, scale2,
    FORWARD: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr, DB: gl.constexpr,
    ENTRIES: gl.constexpr, SIDES: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Forward: out_i = big0 w_iᵀ + h_i rank_iᵀ + bias_i, h_i = scale_i (mask ∘ big0) s_iᵀ; i < P projections

    Backward: out0 = sum_i (big_i w_i + mask ∘ (h_i rank_i)), h_i = scale_i big_i s_i, and with DB the parts
    parts[p] of sum_rows big_iᵀ kept_i, one for each side program p; with ENTRIES only those that a mask of
    s0 has, packed. With SIDES = 0, h is given.

    Tensors   descriptors: big (M, K) or (M, N_i), w (N_i, K), s and rank the small factors (a and b, or b and
              a), out, hid = h and kept (M, P·R); words (M, pitch) int32, the mask's bits; flags, a zero for
              every SIDE_ROWS rows; parts (SIDES, sum of N_i, R) float32 zeros, or with ENTRIES (SIDES,
              entries); entries_ptr (N0,) int32, one bit a rank, and starts_ptr (N0,) int32, where the
              entries of a row begin.
    Program   the first SIDES: blocks of SIDE_ROWS rows of h; the others: tiles of out, GROUP_M rows of tiles
              at a time. One warp copies, eight compute.
    Numerics  16-bit products summed in float32; h rounded once; a dropped element of out is rounded before
              the update; every sum has a fixed order.
    Traffic   h's operand once more from L2 or memory, beside what the GEMM reads.
    Requires  rows on multiples of 16 bytes; R ≤ 128, ≤ 16 with DB, ≤ 32 with ENTRIES, which needs DB and
              P = 1; SLOTS·BLOCK_R ≤ 128, forward with a mask ≤ 64; with RING, stages of side programs, above
              STAGES: forward, RING·SLOTS·BLOCK_R·SIDE_COLS ≤ STAGES·BLOCK_M·BLOCK_K.
    """
    flags_ptr = flags_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    l_bufs = gl.allocate_shared_memory(big0.dtype, [STAGES] + big0.block_type.shape, big0.layout)
    # what is on its way out has the place of stages that side programs, without output, use as such
    BOXES: gl.constexpr = [STAGES + BLOCK_M // BLOCK_K] + w0.block_type.shape
    r_bufs = gl.allocate_shared_memory(w0.dtype, BOXES, w0.layout)
    y_buf = boxes_from(r_bufs, STAGES, BLOCK_M // BLOCK_K)
    y_buf = reinterpret(y_buf, out0.dtype, out0.block_type.shape, out0.layout)
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute_role, (
                big0, s0, rank0, out0, out1, out2, hid, kept, l_bufs, r_bufs, y_buf, empty, full,
                bias0, bias1, bias2, hidden_ptr, flags_ptr, words_ptr, parts_ptr,
                entries_ptr, starts_ptr, entries, pitch, M, N0, N1, N2, K, R,
                scale0, scale1, scale2, FORWARD, BIAS, DROP, DB, ENTRIES, SIDES, P, SLOTS, GROUP_M,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SIDE_ROWS, SIDE_COLS, STAGES, RING,
            )),
            (_copy_role, (
                big0, big1, big2, w0, w1, w2, s0, s1, s2, rank0, rank1, rank2, hid, kept,
                l_bufs, r_bufs, y_buf, empty, full, flags_ptr, M, N0, N1, N2, K, R, FORWARD, DB,
                SIDES, P, SLOTS, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, SIDE_ROWS, SIDE_COLS, STAGES, RING,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip
