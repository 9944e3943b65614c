"""Hopper: a GEMM with the low-rank update inside, beside programs that make the update's hidden factor.

One persistent, warp-specialised launch. Its first SIDES programs run the skinny pass (h = scale·x aᵀ, or
dh = scale·dy b) and raise a flag for every SIDE_ROWS rows; all others run the GEMM, whose sum ends with
the hidden factor: y = [x | h] [w | b]ᵀ or dx = [dy | dh] [w; a]. A GEMM's tiles rarely fill the last wave
of all multiprocessors, so the side programs run on what would stand idle, and the hidden factor's pass
costs no time of its own. Up to three projections share a launch: forward they share x, backward dx.

Where a program waits for a flag, the program that raises it has a lower number, so it was scheduled before.
"""

from ._gluon import (
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store,
)


@gluon.jit
def _flag_raised(flag_ptr):
    """The flag's value; what its writer wrote before is visible afterwards."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flag_ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _proxy_fence(flag):
    """Order ordinary accesses before bulk copies; returns ``flag``."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, $1;", "=r,r", [flag], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_rows(flag_ptr):
    """Wait for rows of the hidden factor, to be read by bulk copies."""
    flag = _flag_raised(flag_ptr)
    while flag == 0:
        flag = _flag_raised(flag_ptr)
    _proxy_fence(flag)


@gluon.jit
def _gemm_end(tiles, SIDES: gl.constexpr):
    """Where a program's loop over tiles ends, which starts at its number less SIDES: sides have none."""
    return gl.where(gl.program_id(0) >= SIDES, tiles, -SIDES)


@gluon.jit
def _side_end(M, SIDES: gl.constexpr, SIDE_ROWS: gl.constexpr):
    """Where a program's loop over blocks of rows ends, which starts at its number: only sides have some."""
    return gl.where(gl.program_id(0) < SIDES, gl.cdiv(M, SIDE_ROWS), 0)


@gluon.jit
def _side_steps(K, SIDE_COLS: gl.constexpr):
    """The steps of a forward pass's side program, an even number: past the end there are zeros."""
    return gl.cdiv(K, 2 * SIDE_COLS) * 2


@gluon.jit
def _tile_at(tile, tiles_m, c0, c1, c2, GROUP_M: gl.constexpr, P: gl.constexpr):
    """(row tile, column tile, projection) of a tile, GROUP_M rows of tiles at a time; c: column tiles.

    The first group has at most 8 rows: more would need a hidden factor that side programs have not made yet.
    """
    tiles_n = c0 + c1 + c2
    size = GROUP_M
    skipped = 0
    if GROUP_M > 8:
        if tile < 8 * tiles_n:
            size = 8
        else:
            skipped = 8
    tile -= skipped * tiles_n
    per_group = size * tiles_n
    first = skipped + tile // per_group * size
    height = min(tiles_m - first, size)
    row = first + tile % per_group % height
    col = tile % per_group // height
    which = 0
    if P > 1:
        if col >= c0:
            col -= c0
            which = 1
            if P > 2:
                if col >= c1:
                    col -= c1
                    which = 2
    return row, col, which


@gluon.jit
def _load_of(d0, d1, d2, which, at0, at1, bar, buf, P: gl.constexpr):
    """Start the copy of a box of the projection's matrix."""
    if P == 1:
        tma_load(d0, [at0, at1], bar, buf)
    else:
        if which == 0:
            tma_load(d0, [at0, at1], bar, buf)
        if which == 1:
            tma_load(d1, [at0, at1], bar, buf)
        if P > 2:
            if which == 2:
                tma_load(d2, [at0, at1], bar, buf)


@gluon.jit
def _store_of(d0, d1, d2, which, at0, at1, buf, P: gl.constexpr):
    if P == 1:
        tma_store(d0, [at0, at1], buf)
    else:
        if which == 0:
            tma_store(d0, [at0, at1], buf)
        if which == 1:
            tma_store(d1, [at0, at1], buf)
        if P > 2:
            if which == 2:
                tma_store(d2, [at0, at1], buf)


@gluon.jit
def _free_stage(step, empty, STAGES: gl.constexpr):
    """Wait until the buffers of ``step`` have been read."""
    mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)


@gluon.jit
def _forward_producer(
    x0, w0, w1, w2, b0, b1, b2, hid, l_bufs, r_bufs, empty, full, flags_ptr,
    M, N0, N1, N2, K, R, SIDES: gl.constexpr, P: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    SIDE_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    c0, c1, c2 = gl.cdiv(N0, BLOCK_N), gl.cdiv(N1, BLOCK_N), gl.cdiv(N2, BLOCK_N)
    tiles_m = gl.cdiv(M, BLOCK_M)
    RANK: gl.constexpr = hid.block_type.shape[1]
    step = 0
    end = _gemm_end(tiles_m * (c0 + c1 + c2), SIDES)
    for tile in range(gl.program_id(0) - SIDES, end, gl.num_programs(0) - SIDES):
        row, col, which = _tile_at(tile, tiles_m, c0, c1, c2, GROUP_M, P)
        row *= BLOCK_M
        col *= BLOCK_N
        for k in range(0, K, BLOCK_K):
            _free_stage(step, empty, STAGES)
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.expect(bar, x0.block_type.nbytes + w0.block_type.nbytes)
            tma_load(x0, [row, k], bar, l_bufs.index(stage))
            _load_of(w0, w1, w2, which, col, k, bar, r_bufs.index(stage), P)
            step += 1
        if SIDES > 0:
            _wait_for_rows(flags_ptr + row // SIDE_ROWS)
        for r in range(0, R, RANK):
            _free_stage(step, empty, STAGES)
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.expect(bar, hid.block_type.nbytes + b0.block_type.nbytes)
            left = reinterpret(l_bufs.index(stage), hid.dtype, hid.block_type.shape, hid.layout)
            right = reinterpret(r_bufs.index(stage), b0.dtype, b0.block_type.shape, b0.layout)
            tma_load(hid, [row, which * R + r], bar, left)
            _load_of(b0, b1, b2, which, col, r, bar, right, P)
            step += 1


@gluon.jit
def _backward_segment(big, w, row, col, depth, step, l_bufs, r_bufs, empty, full,
                      BLOCK_K: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    for k in range(0, depth, BLOCK_K):
        _free_stage(step, empty, STAGES)
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.expect(bar, big.block_type.nbytes + w.block_type.nbytes)
        tma_load(big, [row, k], bar, l_bufs.index(stage))
        tma_load(w, [k, col], bar, r_bufs.index(stage))
        step += 1
    return step


@gluon.jit
def _backward_rank(hid, a, row, col, at, R, step, l_bufs, r_bufs, empty, full, STAGES: gl.constexpr):
    RANK: gl.constexpr = hid.block_type.shape[1]
    for r in range(0, R, RANK):
        _free_stage(step, empty, STAGES)
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.expect(bar, hid.block_type.nbytes + a.block_type.nbytes)
        left = reinterpret(l_bufs.index(stage), hid.dtype, hid.block_type.shape, hid.layout)
        right = reinterpret(r_bufs.index(stage), a.dtype, a.block_type.shape, a.layout)
        tma_load(hid, [row, at + r], bar, left)
        tma_load(a, [r, col], bar, right)
        step += 1
    return step


@gluon.jit
def _backward_producer(
    dy0, dy1, dy2, w0, w1, w2, a0, a1, a2, hid, l_bufs, r_bufs, empty, full, flags_ptr,
    M, N0, N1, N2, K, R, SIDES: gl.constexpr, P: gl.constexpr, GROUP_M: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    SIDE_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(K, BLOCK_N)
    step = 0
    end = _gemm_end(tiles_m * tiles_n, SIDES)
    for tile in range(gl.program_id(0) - SIDES, end, gl.num_programs(0) - SIDES):
        row, col, _ = _tile_at(tile, tiles_m, tiles_n, 0, 0, GROUP_M, 1)
        row *= BLOCK_M
        col *= BLOCK_N
        step = _backward_segment(dy0, w0, row, col, N0, step, l_bufs, r_bufs, empty, full, BLOCK_K, STAGES)
        if P > 1:
            step = _backward_segment(
                dy1, w1, row, col, N1, step, l_bufs, r_bufs, empty, full, BLOCK_K, STAGES
            )
        if P > 2:
            step = _backward_segment(
                dy2, w2, row, col, N2, step, l_bufs, r_bufs, empty, full, BLOCK_K, STAGES
            )
        if SIDES > 0:
            _wait_for_rows(flags_ptr + row // SIDE_ROWS)
        step = _backward_rank(hid, a0, row, col, 0, R, step, l_bufs, r_bufs, empty, full, STAGES)
        if P > 1:
            step = _backward_rank(hid, a1, row, col, R, R, step, l_bufs, r_bufs, empty, full, STAGES)
        if P > 2:
            step = _backward_rank(hid, a2, row, col, 2 * R, R, step, l_bufs, r_bufs, empty, full, STAGES)


@gluon.jit
def _side_load(big, row, k, buf, bar, SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr):
    """Copy SIDE_ROWS rows and SIDE_COLS columns of ``big``, in boxes of the size that the GEMM has."""
    ROWS: gl.constexpr = big.block_type.shape[0]
    COLS: gl.constexpr = big.block_type.shape[1]
    DOWN: gl.constexpr = SIDE_ROWS // ROWS
    BOXES: gl.constexpr = DOWN * (SIDE_COLS // COLS)
    view = reinterpret(buf, big.dtype, [BOXES, ROWS, COLS], big.layout)
    for i in gl.static_range(BOXES):
        tma_load(big, [row + i % DOWN * ROWS, k + i // DOWN * COLS], bar, view.index(i))


@gluon.jit
def _side_forward_producer(
    x, a0, a1, a2, l_bufs, r_bufs, empty, full, M, K,
    SIDES: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SMALL: gl.constexpr = [SLOTS, a0.block_type.shape[0], a0.block_type.shape[1]]
    step = 0
    for block in range(gl.program_id(0), _side_end(M, SIDES, SIDE_ROWS), SIDES):
        for k in range(0, _side_steps(K, SIDE_COLS) * SIDE_COLS, SIDE_COLS):
            _free_stage(step, empty, STAGES)
            stage = step % STAGES
            bar = full.index(stage)
            small = reinterpret(l_bufs.index(stage), a0.dtype, SMALL, a0.layout)
            mbarrier.expect(bar, SIDE_ROWS * SIDE_COLS * 2 + P * a0.block_type.nbytes)
            tma_load(a0, [0, k], bar, small.index(0))
            if P > 1:
                tma_load(a1, [0, k], bar, small.index(1))
            if P > 2:
                tma_load(a2, [0, k], bar, small.index(2))
            _side_load(x, block * SIDE_ROWS, k, r_bufs.index(stage), bar, SIDE_ROWS, SIDE_COLS)
            step += 1


@gluon.jit
def _side_backward_step(
    dy, b, row, k, step, l_bufs, r_bufs, empty, full,
    ROWS: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _free_stage(step, empty, STAGES)
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.expect(bar, ROWS * COLS * 2 + b.block_type.nbytes)
    tma_load(b, [k, 0], bar, reinterpret(l_bufs.index(stage), b.dtype, b.block_type.shape, b.layout))
    _side_load(dy, row, k, r_bufs.index(stage), bar, ROWS, COLS)
    return step + 1


@gluon.jit
def _side_backward_segment(
    dy, b, kept, at, row, depth, count, step, l_bufs, r_bufs, y_buf, empty, full,
    DB: gl.constexpr, SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what a block of rows of one projection needs: with DB first h, to one of two places; dy and b.

    A place is written again two blocks later; by then the ring has seen its last reader done.
    """
    if DB:
        HALF: gl.constexpr = SIDE_ROWS // 2
        _free_stage(step, empty, STAGES)
        bar = full.index(step % STAGES)
        H: gl.constexpr = [4, HALF, kept.block_type.shape[1]]
        h = reinterpret(y_buf, kept.dtype, H, kept.layout)
        mbarrier.expect(bar, 2 * kept.block_type.nbytes)
        tma_load(kept, [row, at], bar, h.index(2 * (count & 1)))
        tma_load(kept, [row + HALF, at], bar, h.index(2 * (count & 1) + 1))
        step += 1
        for k in range(0, depth, HALF):
            step = _side_backward_step(dy, b, row, k, step, l_bufs, r_bufs, empty, full, HALF, HALF, STAGES)
            step = _side_backward_step(
                dy, b, row + HALF, k, step, l_bufs, r_bufs, empty, full, HALF, HALF, STAGES
            )
    else:
        for k in range(0, depth, SIDE_COLS):
            step = _side_backward_step(
                dy, b, row, k, step, l_bufs, r_bufs, empty, full, SIDE_ROWS, SIDE_COLS, STAGES
            )
    return step


@gluon.jit
def _side_backward_producer(
    dy0, dy1, dy2, b0, b1, b2, kept, l_bufs, r_bufs, y_buf, empty, full, M, N0, N1, N2, R,
    DB: gl.constexpr, SIDES: gl.constexpr, P: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    step = 0
    count = 0
    for block in range(gl.program_id(0), _side_end(M, SIDES, SIDE_ROWS), SIDES):
        for i in gl.static_range(P):
            dy, b, depth = dy0, b0, N0
            if i == 1:
                dy, b, depth = dy1, b1, N1
            if i == 2:
                dy, b, depth = dy2, b2, N2
            step = _side_backward_segment(
                dy, b, kept, i * R, block * SIDE_ROWS, depth, count, step, l_bufs, r_bufs, y_buf, empty, full,
                DB, SIDE_ROWS, SIDE_COLS, STAGES,
            )  # fmt: skip
            count += 1
