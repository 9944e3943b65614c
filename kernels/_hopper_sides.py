"""Hopper: the programs beside the GEMM: the hidden factor, and db. See _hopper_gemm."""

from ._gluon import (
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ._hopper_gemm import _proxy_fence, _side_end, _side_steps
from ._hopper_masks import pair_masks, unpack


@gluon.jit
def _raise_flag(flag_ptr):
    """Let others read what this program's threads have written, by bulk copies too."""
    _proxy_fence(gl.to_tensor(0))
    thread_barrier()
    gl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@gluon.jit
def _store_hidden(acc, hidden_ptr, row, at, M, R, WIDTH, scale0, scale1, scale2, BLOCK_R: gl.constexpr):
    """Write scale·acc; its columns are slots of BLOCK_R ranks, one a projection."""
    layout: gl.constexpr = acc.type.layout
    rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))[:, None]
    col = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))[None, :]
    slot = col // BLOCK_R + at
    rank = col % BLOCK_R
    scale = gl.where(slot == 0, scale0, gl.where(slot == 1, scale1, scale2))
    inside = (rows < M) & (rank < R) & (slot * R < WIDTH)
    pointers = hidden_ptr + rows.to(gl.int64) * WIDTH + slot * R + rank
    gl.store(pointers, (acc * scale).to(hidden_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _side_sum(
    acc, x, a, steps, step, l_bufs, r_bufs, empty, full,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc += x aᵀ over a block of rows."""
    for k in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        left = reinterpret(r_bufs.index(stage), x.dtype, [SIDE_ROWS, SIDE_COLS], x.layout)
        right = reinterpret(l_bufs.index(stage), a.dtype, [acc.shape[1], SIDE_COLS], a.layout)
        acc = warpgroup_mma(left, right.permute((1, 0)), acc, use_acc=k > 0, is_async=True)
        # products are short: a stage that is free at once is worth more than one in flight
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return acc, step


@gluon.jit
def _word_pointers(words_ptr, pitch, row, M, ROWS: gl.constexpr):
    """Where the first two words of each row are, in the threads that need them; of rows past the end, any."""
    WORDS: gl.constexpr = 2
    # as pairs have them, but two words of a row side by side, for one load
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [128, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]], [], [ROWS, WORDS],
    )  # fmt: skip
    r = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), M - 1)[:, None]
    return words_ptr + r.to(gl.int64) * pitch + gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _words_at(pointers, word, pitch):
    c = word + gl.arange(0, pointers.shape[1], gl.SliceLayout(0, pointers.type.layout))[None, :]
    # past the end x is zero
    return gl.load(pointers + word, mask=c < pitch)


@gluon.jit
def _masked_pairs(
    step, words, ready, r_bufs, full, layout: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """mask ∘ x of a step, two elements to an int32; anything if not ``ready``."""
    in_pairs: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1, pred=ready)
    tile = reinterpret(r_bufs.index(stage), gl.int32, [SIDE_ROWS, SIDE_COLS // 2], in_pairs)
    pairs = tile.load(layout)
    SPLIT: gl.constexpr = pairs.reshape([SIDE_ROWS, words.shape[1], 16]).type.layout
    words = gl.convert_layout(words, gl.SliceLayout(2, SPLIT)).expand_dims(2)
    return pairs & pair_masks(pairs, words)


@gluon.jit
def _masked_step(
    acc, now, then, words, places, k, step, before, after, x, a, l_bufs, r_bufs, empty, full, pitch,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start acc += now aᵀ of step k, and meanwhile make the operand of the step after, which has ``words``.

    It takes the registers ``then`` once the step before is done, whose operand was there. ``before`` and
    ``after`` say whether there are such steps. Also returns the words of the step that uses ``then`` next.
    """
    WORDS: gl.constexpr = SIDE_COLS // 32
    layout: gl.constexpr = then.type.layout
    right = reinterpret(l_bufs.index(step % STAGES), a.dtype, [acc.shape[1], SIDE_COLS], a.layout)
    left = unpack(now, x.dtype, gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(left, right.permute((1, 0)), acc, use_acc=before, is_async=True)
    acc, then = warpgroup_mma_wait(1, (acc, then))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=before)
    then = _masked_pairs(step + 1, words, after, r_bufs, full, layout, SIDE_ROWS, SIDE_COLS, STAGES)
    return acc, then, _words_at(places, (k + 3) * WORDS, pitch)


@gluon.jit
def _masked_side_sum(
    acc, x, a, row, steps, step, l_bufs, r_bufs, empty, full, words_ptr, pitch, M,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc += (mask ∘ x) aᵀ over a block of rows; x meets the mask in registers. ``steps`` is even.

    Operands of even and of odd steps have registers of their own: one is made while the tensor cores read
    the other. The mask's words are read three steps ahead.
    """
    WORDS: gl.constexpr = SIDE_COLS // 32
    # the same elements in the same threads, two to an int32
    parent: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, acc.shape[1], 8])
    layout: gl.constexpr = gl.DotOperandLayout(0, parent, 1)
    places = _word_pointers(words_ptr, pitch, row, M, SIDE_ROWS)
    even_words = _words_at(places, 0, pitch)
    odd_words = _words_at(places, WORDS, pitch)
    even = _masked_pairs(step, even_words, True, r_bufs, full, layout, SIDE_ROWS, SIDE_COLS, STAGES)
    even_words = _words_at(places, 2 * WORDS, pitch)
    odd = gl.zeros((SIDE_ROWS, SIDE_COLS // 2), gl.int32, layout)
    for k in range(0, steps, 2):
        acc, odd, odd_words = _masked_step(
            acc, even, odd, odd_words, places, k, step, k > 0, True,
            x, a, l_bufs, r_bufs, empty, full, pitch, SIDE_ROWS, SIDE_COLS, STAGES,
        )  # fmt: skip
        acc, even, even_words = _masked_step(
            acc, odd, even, even_words, places, k + 1, step + 1, True, k + 2 < steps,
            x, a, l_bufs, r_bufs, empty, full, pitch, SIDE_ROWS, SIDE_COLS, STAGES,
        )  # fmt: skip
        step += 2
    acc, odd = warpgroup_mma_wait(0, (acc, odd))
    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def _side_forward(
    x, a, l_bufs, r_bufs, empty, full, hidden_ptr, flags_ptr, words_ptr, pitch,
    M, K, R, scale0, scale1, scale2, DROP: gl.constexpr, SIDES: gl.constexpr,
    P: gl.constexpr, SLOTS: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """h = scale·(mask ∘ x) aᵀ of all projections, a block of rows at a time."""
    WIDE: gl.constexpr = BLOCK_R * SLOTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDE, 16])
    steps = _side_steps(K, SIDE_COLS)
    step = 0
    for block in range(gl.program_id(0), _side_end(M, SIDES, SIDE_ROWS), SIDES):
        row = block * SIDE_ROWS
        acc = gl.zeros((SIDE_ROWS, WIDE), gl.float32, layout)
        if DROP:
            acc, step = _masked_side_sum(
                acc, x, a, row, steps, step, l_bufs, r_bufs, empty, full, words_ptr, pitch, M,
                SIDE_ROWS, SIDE_COLS, STAGES,
            )  # fmt: skip
        else:
            acc, step = _side_sum(
                acc, x, a, steps, step, l_bufs, r_bufs, empty, full, SIDE_ROWS, SIDE_COLS, STAGES
            )
        _store_hidden(acc, hidden_ptr, row, 0, M, R, P * R, scale0, scale1, scale2, BLOCK_R)
        _raise_flag(flags_ptr + block)


@gluon.jit
def _side_hidden(
    dy, b, row, at, depth, step, l_bufs, r_bufs, empty, full, hidden_ptr, M, R, WIDTH, scale,
    BLOCK_R: gl.constexpr, SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dh = scale·dy b of a block of rows of one projection."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_R, 16])
    acc = gl.zeros((SIDE_ROWS, BLOCK_R), gl.float32, layout)
    for k in range(gl.cdiv(depth, SIDE_COLS)):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        left = reinterpret(r_bufs.index(stage), dy.dtype, [SIDE_ROWS, SIDE_COLS], dy.layout)
        right = reinterpret(l_bufs.index(stage), b.dtype, b.block_type.shape, b.layout)
        acc = warpgroup_mma(left, right, acc, use_acc=k > 0, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    _store_hidden(acc, hidden_ptr + at, row, 0, M, R, WIDTH, scale, scale, scale, BLOCK_R)
    return step


@gluon.jit
def _add_part(parts_ptr, part, k, depth, R):
    """Add a tile of db to this program's own sum; one thread alone adds to a place, so the order is fixed."""
    col = k + gl.arange(0, part.shape[0], gl.SliceLayout(1, part.type.layout))[:, None]
    rank = gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))[None, :]
    inside = (col >= 0) & (col < depth) & (rank < R)
    gl.atomic_add(parts_ptr + col * R + rank, part, mask=inside, sem="relaxed", scope="gpu")


@gluon.jit
def _entries_of(words_ptr, starts_ptr, k, depth, HALF: gl.constexpr, layout: gl.constexpr):
    """The words of HALF rows of b's mask, one a row, and where the entries of each row begin."""
    row = k + gl.arange(0, HALF, layout)
    words = gl.load(words_ptr + row, mask=row < depth, other=0)
    return words, gl.load(starts_ptr + row, mask=row < depth, other=0)


@gluon.jit
def _add_entries(entries_ptr, part, words, starts):
    """Add those entries of a tile of db that b's mask has to this program's own packed sum, as _add_part."""
    rank = gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))[None, :]
    before = words[:, None] & ((1 << rank) - 1)
    count = gl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", [before], dtype=gl.int32, is_pure=True, pack=1
    )
    inside = (words[:, None] >> rank & 1) != 0
    gl.atomic_add(entries_ptr + (starts[:, None] + count), part, mask=inside, sem="relaxed", scope="gpu")


@gluon.jit
def _half_step(
    dy, b, h, acc, part, add, step, l_bufs, r_bufs, full, HALF: gl.constexpr, STAGES: gl.constexpr
):
    """Start acc += dy b and part += dyᵀ h for a square tile of dy."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    left = reinterpret(r_bufs.index(stage), dy.dtype, [HALF, HALF], dy.layout)
    right = reinterpret(l_bufs.index(stage), b.dtype, b.block_type.shape, b.layout)
    acc = warpgroup_mma(left, right, acc, is_async=True)
    part = warpgroup_mma(left.permute((1, 0)), h, part, use_acc=add, is_async=True)
    return acc, part


@gluon.jit
def _side_hidden_b(
    dy, b, kept, row, at, depth, count, step, l_bufs, r_bufs, y_buf, empty, full, parts_ptr,
    entries_ptr, starts_ptr, hidden_ptr, M, R, WIDTH, scale,
    ENTRIES: gl.constexpr, BLOCK_R: gl.constexpr, SIDE_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dh as _side_hidden, and this block's part of db = dyᵀ h from the same read of dy.

    With ENTRIES only of what b's mask has, packed.
    """
    HALF: gl.constexpr = SIDE_ROWS // 2
    H: gl.constexpr = [4, HALF, BLOCK_R]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_R, 16])
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    step += 1
    h = reinterpret(y_buf, kept.dtype, H, kept.layout)
    above = gl.zeros((HALF, BLOCK_R), gl.float32, layout)
    below = gl.zeros((HALF, BLOCK_R), gl.float32, layout)
    done = gl.zeros((HALF, BLOCK_R), gl.float32, layout)
    if ENTRIES:
        words = gl.zeros((HALF,), gl.int32, gl.SliceLayout(1, layout))
        starts = words
    for k in range(0, depth, HALF):
        part = gl.zeros((HALF, BLOCK_R), gl.float32, layout)
        above, part = _half_step(
            dy, b, h.index(2 * (count & 1)), above, part, False, step, l_bufs, r_bufs, full, HALF, STAGES
        )
        # the tile before, while the tensor cores are at this one
        if ENTRIES:
            _add_entries(parts_ptr, done, words, starts)
            words, starts = _entries_of(entries_ptr, starts_ptr, k, depth, HALF, gl.SliceLayout(1, layout))
        else:
            _add_part(parts_ptr, done, k - HALF, depth, R)
        above, part = warpgroup_mma_wait(0, (above, part))
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
        below, part = _half_step(
            dy, b, h.index(2 * (count & 1) + 1), below, part, True, step, l_bufs, r_bufs, full, HALF, STAGES
        )
        below, done = warpgroup_mma_wait(0, (below, part))
        mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    if ENTRIES:
        _add_entries(parts_ptr, done, words, starts)
    else:
        _add_part(parts_ptr, done, (gl.cdiv(depth, HALF) - 1) * HALF, depth, R)
    _store_hidden(above, hidden_ptr + at, row, 0, M, R, WIDTH, scale, scale, scale, BLOCK_R)
    _store_hidden(below, hidden_ptr + at, row + HALF, 0, M, R, WIDTH, scale, scale, scale, BLOCK_R)
    return step


@gluon.jit
def _side_backward(
    dy, b, kept, l_bufs, r_bufs, y_buf, empty, full, hidden_ptr, flags_ptr, parts_ptr,
    entries_ptr, starts_ptr, entries, M, N0, N1, N2, R, scale0, scale1, scale2,
    DB: gl.constexpr, ENTRIES: gl.constexpr, SIDES: gl.constexpr, P: gl.constexpr, BLOCK_R: gl.constexpr,
    SIDE_ROWS: gl.constexpr, SIDE_COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    own_ptr = parts_ptr
    if ENTRIES:
        own_ptr += gl.program_id(0) * entries
    elif DB:
        own_ptr += gl.program_id(0) * (N0 + N1 + N2) * R
    step = 0
    count = 0
    for block in range(gl.program_id(0), _side_end(M, SIDES, SIDE_ROWS), SIDES):
        for i in gl.static_range(P):
            depth, scale, first = N0, scale0, 0
            if i == 1:
                depth, scale, first = N1, scale1, N0
            if i == 2:
                depth, scale, first = N2, scale2, N0 + N1
            row = block * SIDE_ROWS
            if DB:
                step = _side_hidden_b(
                    dy, b, kept, row, i * R, depth, count, step, l_bufs, r_bufs, y_buf, empty, full,
                    own_ptr + first * R, entries_ptr, starts_ptr, hidden_ptr, M, R, P * R, scale,
                    ENTRIES, BLOCK_R, SIDE_ROWS, STAGES,
                )  # fmt: skip
            else:
                step = _side_hidden(
                    dy, b, row, i * R, depth, step, l_bufs, r_bufs, empty, full, hidden_ptr, M, R, P * R,
                    scale, BLOCK_R, SIDE_ROWS, SIDE_COLS, STAGES,
                )  # fmt: skip
            count += 1
        _raise_flag(flags_ptr + block)
