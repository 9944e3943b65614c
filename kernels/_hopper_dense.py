"""Hopper: DenseLoRA's forward pass in one launch, of the roles and the order of _hopper_gemm.

The update passes through an activation of its own before it meets the base, so it cannot extend the sum over
K. It is made after it instead, 64 columns at a time: z = h bᵀ of those columns is a product of one step,
small enough to stand beside the accumulator in registers. So the side programs that make u and h are hidden
behind the sums over K, as LoRA's are.
"""

from ._gluon import (
    boxes_from,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ._hopper_draw import begin, byte_tops, keep_words, rows_begun
from ._hopper_gemm import (
    _forward_producer,
    _gemm_end,
    _side_end,
    _side_forward_producer,
    _side_steps,
    _tile_at,
)
from ._hopper_roles import _accumulate
from ._hopper_sides import _masked_side_sum, _raise_flag, _side_sum


@gluon.jit
def _gelu(z):
    """z Phi(z), as _gelu.gelu with FAST."""
    size = gl.abs(z)
    root = gl.rsqrt(1.0 + 0.23164189 * size)
    t = root * root
    p = 0.5307027145 * t - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return gl.maximum(z, 0.0) - size * (p * t * gl.exp2(-0.72134752 * z * z))


@gluon.jit
def _fourths(tile):
    """The four tensors of the last index of (…, 4)."""
    even, odd = tile.reshape(tile.shape[:-1] + [2, 2]).split()
    t0, t2 = even.split()
    t1, t3 = odd.split()
    return t0, t1, t2, t3


@gluon.jit
def _kept(z, even, byte: gl.constexpr):
    """z where the top bit of a byte is set, else zero."""
    asm: gl.constexpr = "{ .reg .b32 all; prmt.b32 all, $2, 0, " + byte + "; and.b32 $0, $1, all; }"
    return gl.inline_asm_elementwise(asm, "=f,f,r", [z, even], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _drop(z, seed, row, col, threshold):
    """z, (ROWS, 64), where the mask keeps it, else zero; see _hopper_draw."""
    ROWS: gl.constexpr = z.shape[0]
    WORDS: gl.constexpr = z.shape[1] // 32
    # (row, word, t, column of two, j)
    split = z.reshape([ROWS, WORDS, 4, 4, 2]).permute((0, 1, 3, 4, 2))
    PAIRS: gl.constexpr = z.reshape([ROWS, WORDS * 16, 2]).split()[0].type.layout
    r, w, begun = begin(ROWS, WORDS * 16, PAIRS, seed, row)
    words = keep_words(seed, threshold, w + col // 32, begun)
    even, odd = byte_tops(words, ROWS, WORDS)
    tops = gl.convert_layout(gl.join(even, odd), gl.SliceLayout(4, split.type.layout))
    z0, z1, z2, z3 = _fourths(split)
    z0 = _kept(z0, gl.convert_layout(tops, z0.type.layout), "0x8888")
    z1 = _kept(z1, gl.convert_layout(tops, z1.type.layout), "0x9999")
    z2 = _kept(z2, gl.convert_layout(tops, z2.type.layout), "0xAAAA")
    z3 = _kept(z3, gl.convert_layout(tops, z3.type.layout), "0xBBBB")
    kept = gl.join(gl.join(z0, z2), gl.join(z1, z3)).reshape([ROWS, WORDS, 4, 2, 4]).permute((0, 1, 4, 2, 3))
    return gl.convert_layout(kept.reshape([ROWS, z.shape[1]]), z.type.layout)


@gluon.jit
def _drop_elements(t, seed, row, threshold):
    """t where the mask keeps it, else zero; at most 64 columns. A lane draws all words of its rows."""
    layout: gl.constexpr = t.type.layout
    rows = row + gl.arange(0, t.shape[0], gl.SliceLayout(1, layout))
    begun = rows_begun(seed, rows)
    col = gl.arange(0, t.shape[1], gl.SliceLayout(0, layout))[None, :]
    words = keep_words(seed, threshold, rows * 0, begun)[:, None]
    if t.shape[1] > 32:
        words = gl.where(col < 32, words, keep_words(seed, threshold, rows * 0 + 1, begun)[:, None])
    return gl.where((words >> (col & 31)) & 1 == 1, t, 0.0)


@gluon.jit
def _side_hidden(
    x, encoder, l_bufs, r_bufs, empty, full, u_ptr, h_ptr, flags_ptr, words_ptr, pitch, seed_ptr,
    M, K, R, threshold, keep_scale, GELU: gl.constexpr, DROP: gl.constexpr, SIDES: gl.constexpr,
    BLOCK_R: gl.constexpr, SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """u = drop(x) encoderᵀ and h = drop(g(u)), a block of rows at a time."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_R, 16])
    steps = _side_steps(K, SIDE_COLS)
    step = 0
    for block in range(gl.program_id(0), _side_end(M, SIDES, SIDE_ROWS), SIDES):
        row = block * SIDE_ROWS
        acc = gl.zeros((SIDE_ROWS, BLOCK_R), gl.float32, layout)
        if DROP:
            acc, step = _masked_side_sum(
                acc, x, encoder, row, steps, step, l_bufs, r_bufs, empty, full, words_ptr, pitch, M,
                SIDE_ROWS, SIDE_COLS, STAGES,
            )  # fmt: skip
        else:
            acc, step = _side_sum(
                acc, x, encoder, steps, step, l_bufs, r_bufs, empty, full, SIDE_ROWS, SIDE_COLS, STAGES
            )
        u = (acc * keep_scale).to(u_ptr.dtype.element_ty)
        h = u.to(gl.float32)
        if GELU:
            h = _gelu(h)
        if DROP:
            h = _drop_elements(h * keep_scale, gl.load(seed_ptr + 1), row, threshold)
        rows = row + gl.arange(0, SIDE_ROWS, gl.SliceLayout(1, layout))[:, None]
        col = gl.arange(0, BLOCK_R, gl.SliceLayout(0, layout))[None, :]
        offs = rows.to(gl.int64) * R + col
        inside = (rows < M) & (col < R)
        gl.store(u_ptr + offs, u, mask=inside)
        gl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=inside)
        _raise_flag(flags_ptr + block)


@gluon.jit
def _add_update(
    acc, left, right, y_buf, seed, row, col, scale, threshold, GELU: gl.constexpr, DROP: gl.constexpr
):
    """y_buf = acc + scale·drop(g(left rightᵀ)), 64 columns at a time; acc (ROWS, 256)."""
    ROWS: gl.constexpr = acc.shape[0]
    thin: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    base = _fourths(acc.reshape([ROWS, 4, 64]).permute((0, 2, 1)))
    for j in gl.static_range(4):
        z = gl.zeros((ROWS, 64), gl.float32, thin)
        z = warpgroup_mma(left, right.index(j).permute((1, 0)), z, use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, (z,))
        if GELU:
            z = _gelu(z)
        z = z * scale
        if DROP:
            z = _drop(z, seed, row, col + j * 64, threshold)
        y_buf.index(j).store((gl.convert_layout(base[j], thin) + z).to(y_buf.dtype))


@gluon.jit
def _dense_consumer(
    out, hid, factor, l_bufs, r_bufs, y_buf, empty, full, bias_ptr, seed_ptr, M, N, K, scale, threshold,
    GELU: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr, SIDES: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    RANK: gl.constexpr = hid.block_type.shape[1]
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    seed = gl.to_tensor(0)
    if DROP:
        seed = gl.load(seed_ptr + 2)
    step = 0
    end = _gemm_end(tiles_m * tiles_n, SIDES)
    for tile in range(gl.program_id(0) - SIDES, end, gl.num_programs(0) - SIDES):
        row, col, _ = _tile_at(tile, tiles_m, tiles_n, 0, 0, GROUP_M, 1)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        if BIAS:
            offs = col * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc += gl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(gl.float32)[None, :]
        for k in range(gl.cdiv(K, BLOCK_K)):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            right = r_bufs.index(stage).permute((1, 0))
            acc = _accumulate(l_bufs.index(stage), right, acc, (k > 0) | BIAS, step, k == 0, empty, STAGES)
            step += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        # y_buf may still be on its way out from the tile before
        tma_store_wait(0)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        left = reinterpret(l_bufs.index(stage), hid.dtype, hid.block_type.shape, hid.layout)
        right = reinterpret(r_bufs.index(stage), factor.dtype, [BLOCK_N // 64, 64, RANK], factor.layout)
        _add_update(acc, left, right, y_buf, seed, row * BLOCK_M, col * BLOCK_N, scale, threshold, GELU, DROP)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
        fence_async_shared()
        for j in gl.static_range(BLOCK_N // 64):
            tma_store(out, [row * BLOCK_M, col * BLOCK_N + j * 64], y_buf.index(j))
    tma_store_wait(0)


@gluon.jit
def _copy_role(
    x, w, encoder, factor, hid, l_bufs, r_bufs, empty, full, flags_ptr, M, N, K, R,
    SIDES: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    if SIDES > 0:
        small = reinterpret(l_bufs, encoder.dtype, [RING, BLOCK_R, SIDE_COLS], encoder.layout)
        _side_forward_producer(
            x, encoder, encoder, encoder, small, r_bufs, empty, full, M, K,
            SIDES, 1, 1, SIDE_ROWS, SIDE_COLS, RING,
        )  # fmt: skip
    _forward_producer(
        x, w, w, w, factor, factor, factor, hid, l_bufs, r_bufs, empty, full, flags_ptr,
        M, N, 0, 0, K, R, SIDES, 1, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, SIDE_ROWS, STAGES,
    )  # fmt: skip


@gluon.jit
def _compute_role(
    x, encoder, factor, out, hid, l_bufs, r_bufs, y_buf, empty, full,
    bias_ptr, u_ptr, h_ptr, flags_ptr, words_ptr, pitch, seed_ptr, M, N, K, R, scale, threshold, keep_scale,
    GELU: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr, SIDES: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    if SIDES > 0:
        small = reinterpret(l_bufs, encoder.dtype, [RING, BLOCK_R, SIDE_COLS], encoder.layout)
        _side_hidden(
            x, encoder, small, r_bufs, empty, full, u_ptr, h_ptr, flags_ptr, words_ptr, pitch, seed_ptr,
            M, K, R, threshold, keep_scale, GELU, DROP, SIDES, BLOCK_R, SIDE_ROWS, SIDE_COLS, RING,
        )  # fmt: skip
    _dense_consumer(
        out, hid, factor, l_bufs, r_bufs, y_buf, empty, full, bias_ptr, seed_ptr, M, N, K, scale * keep_scale,
        threshold, GELU, BIAS, DROP, SIDES, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip


@gluon.jit
def hopper_dense_kernel(
    x, w, encoder, factor, out, hid, bias_ptr, u_ptr, h_ptr, flags_ptr, words_ptr, pitch, seed_ptr,
    M, N, K, R, scale, threshold, keep_scale,
    GELU: gl.constexpr, BIAS: gl.constexpr, DROP: gl.constexpr, SIDES: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """out = x wᵀ + bias + scale·drop₃(g(h factorᵀ)), h = drop₂(g(u)), u = drop₁(x) encoderᵀ

    Tensors   descriptors: x (M, K), w (N, K), encoder (R, K), factor (N, R), out (M, N) in boxes of 64
              columns, hid = h (M, R); u like h; words (M, pitch) int32, bits of drop₁; seed (3,); flags,
              a zero for every SIDE_ROWS rows. With SIDES = 0, h is given, and u is not made.
    Program   the first SIDES: blocks of SIDE_ROWS rows of u and h; the others: tiles of out, GROUP_M rows of
              tiles at a time. One warp copies, eight compute.
    Numerics  16-bit products summed in float32; u and h rounded once; a zero factor adds exactly zero.
    Traffic   x once more from L2 or memory, beside what the GEMM reads.
    Requires  rows on multiples of 16 bytes; R ≤ 64; BLOCK_N = 256; RING, stages of side programs, as in
              hopper_kernel.
    """
    flags_ptr = flags_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    l_bufs = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    # what is on its way out has the place of stages that side programs, without output, use as such
    BOXES: gl.constexpr = [STAGES + BLOCK_M // BLOCK_K] + w.block_type.shape
    r_bufs = gl.allocate_shared_memory(w.dtype, BOXES, w.layout)
    y_buf = boxes_from(r_bufs, STAGES, BLOCK_M // BLOCK_K)
    y_buf = reinterpret(y_buf, out.dtype, [BLOCK_N // 64] + out.block_type.shape, out.layout)
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute_role, (
                x, encoder, factor, out, hid, l_bufs, r_bufs, y_buf, empty, full,
                bias_ptr, u_ptr, h_ptr, flags_ptr, words_ptr, pitch, seed_ptr,
                M, N, K, R, scale, threshold, keep_scale, GELU, BIAS, DROP, SIDES, GROUP_M,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SIDE_ROWS, SIDE_COLS, STAGES, RING,
            )),
            (_copy_role, (
                x, w, encoder, factor, hid, l_bufs, r_bufs, empty, full, flags_ptr, M, N, K, R,
                SIDES, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SIDE_ROWS, SIDE_COLS, STAGES, RING,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip
