"""Which sizes the Hopper kernels serve, and with which of their own: a pure lookup."""

import itertools
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import hopper_lora  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402
from lowrank_ops.kernels._hopper_gemm import _tile_at  # noqa: E402
from lowrank_ops.kernels.hopper import HopperConfig  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

H100 = DeviceFacts(arch="sm90", processors=132)
OTHERS = [
    DeviceFacts(arch=arch, processors=n)
    for arch, n in (("sm80", 108), ("sm100", 148), ("gfx942", 304), ("cpu", 4))
]
TOKENS = [0, 1, 7, 128, 1000, 2048, 2056, 8192, 131072, 10_000_000]
PROJECTIONS = [(0,), (8,), (1024,), (4096,), (128256,), (4096, 1024, 1024), (14336, 14336), (8, 4096)]
DEPTHS = [0, 8, 515, 4096, 28672]
RANKS = [1, 8, 16, 24, 32, 64, 100, 128, 256, 512]


@pytest.mark.parametrize("facts", [H100, *OTHERS], ids=lambda facts: facts.arch)
def test_a_choice_is_a_pure_lookup_that_never_raises(facts):
    served = 0
    for M, Ns, K, R in itertools.product(TOKENS, PROJECTIONS, DEPTHS, RANKS):
        found = [hopper_lora.backward_config(M, Ns, K, R, facts)]
        found += [hopper_lora.forward_config(M, Ns, K, R, drop, facts) for drop in (False, True)]
        for config in found:
            # compiling is tested for these sizes, with and without side programs, in any order of tiles
            free = {"SIDES": (0, 4), "GROUP_M": range(1, 65)}
            assert config is None or all(getattr(config, name) in values for name, values in free.items())
            assert config is None or replace(config, SIDES=4, GROUP_M=8) == HopperConfig()
        served += any(config is not None for config in found)
        again = hopper_lora.backward_config.__wrapped__(M, Ns, K, R, facts)
        assert again == found[0]
    assert (served > 100) == (facts.arch == "sm90")


@pytest.mark.parametrize("M", [0, 1, 64, 128])
def test_too_few_tiles_are_left_to_others(M):
    for drop in (False, True):
        assert hopper_lora.forward_config(M, (4096,), 4096, 16, drop, H100) is None
    assert hopper_lora.backward_config(M, (4096,), 4096, 16, H100) is None
    assert not hopper_lora._worthwhile(M, (4096,), (4096,), H100)


def test_side_programs_run_where_a_last_wave_has_room_and_not_where_waves_are_full():
    for M, Ns, K in [(8192, (4352,), 4032), (8192, (4352, 1024, 1024), 4032)]:
        assert hopper_lora.forward_config(M, Ns, K, 16, False, H100).SIDES == 4
        assert hopper_lora.backward_config(M, Ns, K, 16, H100).SIDES == 4
    # 12 x 11 tiles are one wave of 132
    assert hopper_lora.forward_config(1536, (2816,), 8192, 16, False, H100).SIDES == 0
    assert hopper_lora.backward_config(1536, (8192,), 2816, 16, H100).SIDES == 0


def sides(config: HopperConfig | None) -> int:
    return 0 if config is None else config.SIDES


def test_ranks_that_do_not_fit_a_side_program_have_none():
    # ranks are padded to a power of two, and projections to two or four
    most = {1: 128, 2: 64, 3: 32}
    many = list(itertools.product((512, 1000, 2048, 8192), (1024, 4096, 8192, 14336), (512, 4096, 8192)))
    for (P, limit), drop in itertools.product(most.items(), (False, True)):
        # beside a mask in registers there is room for half of them
        limit //= 1 + drop
        for R, some in ((limit, True), (limit + 1, False), (4 * limit + 1, False), (512, False)):
            found = [sides(hopper_lora.forward_config(M, (N,) * P, K, R, drop, H100)) for M, N, K in many]
            assert any(found) == some, (P, R, drop)
    for P in (1, 2, 3):
        for R, some in ((128, True), (129, False), (512, False)):
            found = [sides(hopper_lora.backward_config(M, (N,) * P, K, R, H100)) for M, N, K in many]
            assert any(found) == some, (P, R)


@pytest.mark.parametrize(
    ("Ns", "K", "R"),
    [((4096,), 4096, 16), ((14336,), 4096, 16), ((4096,), 14336, 16), ((4096, 1024, 1024), 4096, 16),
     ((4096,), 4096, 64)],
)  # fmt: skip
def test_side_programs_read_a_mask_where_they_have_time_without_one(Ns, K, R):
    for M in (2048, 8192):
        plain, masked = (hopper_lora.forward_config(M, Ns, K, R, drop, H100) for drop in (False, True))
        assert masked.SIDES == plain.SIDES == 4
        # where a wave is many columns wide rows are due late in any order, else only in low groups of tiles
        assert masked.GROUP_M == (plain.GROUP_M if Ns == (14336,) else min(plain.GROUP_M, 8))


def test_a_mask_and_h_are_made_in_one_launch_where_that_is_faster(monkeypatch):
    # one wave of tiles leaves little time; or as many ranks as make a step of side programs two of a tile
    for N, R in [(1024, 16), (4096, 128)]:
        assert hopper_lora.forward_config(8192, (N,), 4096, R, True, H100).SIDES == 0
    # or a step with a mask that is too slow
    monkeypatch.setitem(hopper_lora._MASKED_SIDE, 16, 1.2)
    config = hopper_lora.forward_config.__wrapped__(8192, (4096,), 4096, 16, True, H100)
    assert config.SIDES == 0


@pytest.mark.parametrize("group", [1, 4, 8, 12, 16, 32])
def test_every_tile_has_its_turn_and_the_first_need_eight_rows_of_tiles(group):
    for rows, columns in itertools.product((1, 7, 8, 9, 17, 40), (1, 3, 16)):
        order = [_tile_at.fn(i, rows, columns, 0, 0, group, 1)[:2] for i in range(rows * columns)]
        assert sorted(order) == list(itertools.product(range(rows), range(columns)))
        assert all(row < 8 for row, _ in order[: 8 * columns])
        due = hopper_lora._due(128 * rows, columns, 1.0, group, 1)
        assert due == {block: order.index((2 * block, 0)) + 1 for block in range((rows + 1) // 2)}


def test_only_a_plain_update_of_16_bits_must_beat_cublas(monkeypatch):
    limits = []
    monkeypatch.setattr(hopper_lora, "_worthwhile", lambda *sizes: limits.append(sizes[-1]))
    dy, w = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(32, 48, dtype=torch.bfloat16)
    seed = torch.zeros(1, dtype=torch.int64)
    for dtype, some in ((torch.bfloat16, None), (torch.bfloat16, seed), (torch.float32, None)):
        factors = torch.empty(64, 16, dtype=dtype), torch.empty(16, 48, dtype=dtype)
        assert hopper_lora.update_matmul(False, dy, w, *factors, None, some, 0.1) is None
    assert limits == [hopper_lora._SURE, hopper_lora._ALIKE, hopper_lora._ALIKE]


def test_a_launch_of_several_projections_has_a_row_of_its_own(monkeypatch):
    key = hopper_lora.table_key("hopper_forward", 8000, (14336, 14336), 4096)
    rows = {key: {"GROUP_M": 16}}
    monkeypatch.setattr(hopper_lora, "measured_rows", lambda facts: rows)
    for Ns, group in (((14336, 14336), 16), ((28672,), 8)):
        for R in (16, 64):
            config = hopper_lora.forward_config.__wrapped__(8192, Ns, 4096, R, False, H100)
            assert config.GROUP_M == group
        given = hopper_lora.given_config.__wrapped__("hopper_forward", 8192, Ns, 4096, H100)
        assert given == HopperConfig(SIDES=0, GROUP_M=group)


def test_side_programs_of_128_ranks_are_left_out_where_a_tile_is_done_before_their_step():
    # side programs that cannot keep up made this 1.5 times as long
    assert hopper_lora.backward_config(8192, (1024,), 4096, 128, H100).SIDES == 0
    assert hopper_lora.backward_config(8192, (1024,), 4096, 64, H100).SIDES == 4
    assert hopper_lora.forward_config(2048, (14336,), 4096, 128, False, H100).SIDES == 0


def _filled(M: int, cols: int, rows: int, width: int) -> float:
    tiles = triton.cdiv(M, rows) * triton.cdiv(cols, width)
    return tiles / (triton.cdiv(tiles, 132) * 132)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_products_that_would_leave_multiprocessors_idle_are_left_to_cublas(forward):
    # between the sizes of tables too, whose rows are of the next power of two
    op, kept = "lora_forward" if forward else "lora_backward_input", {"hopper": 0, "portable": 0, "cublas": 0}
    sizes = itertools.product((129, 256, 300, 512, 700, 1024, 1200, 1536, 2048, 2500, 3000, 4096), (16, 128))
    for (M, R), cols, depth in itertools.product(
        sizes, (256, 1024, 1536, 2048, 4096), (64, 576, 1024, 4096, 14336)
    ):
        N, K = (cols, depth) if forward else (depth, cols)
        if hopper_lora._worthwhile(M, (cols,), (depth,), H100):
            tile, by = (128, 256), "hopper"
        else:
            config = kernels.pick(op, M, N, K, R, torch.bfloat16, H100)
            tile, by = (config.BLOCK_ROWS, config.BLOCK_COLS), "cublas" if config.CUBLAS else "portable"
            assert hopper_lora.forward_config(M, (cols,), depth, R, False, H100) is None
            assert hopper_lora.backward_config(M, (depth,), cols, R, H100) is None
        assert by == "cublas" or _filled(M, cols, *tile) >= 0.7, (M, N, K, R, tile)
        kept[by] += 1
    assert min(kept.values()) > 0, kept


def test_full_waves_of_large_tiles_are_kept_and_others_only_while_an_update_costs_more():
    for M, N, K in [(2048, 4096, 4096), (8192, 14336, 4096), (8192, 1024, 4096), (1024, 4096, 4096)]:
        assert hopper_lora._worthwhile(M, (N,), (K,), H100)
    # one and a half waves, which cuBLAS has smaller tiles for: with few steps these save less than an update
    served = [hopper_lora._worthwhile(1536, (4096,), (K,), H100) for K in (512, 2048, 4096, 14336)]
    assert served == [True, False, False, False]
    # beside two small projections there is one launch instead of three
    served = [
        hopper_lora._worthwhile(1280, Ns, (4096,), H100) for Ns in ((4096,), (1024,), (4096, 1024, 1024))
    ]
    assert served == [False, False, True]


@pytest.mark.parametrize("R", [64, 128])
def test_many_ranks_beside_few_tiles_are_left_to_cublas(R):
    assert hopper_lora.forward_config(2048, (1024,), 4096, R, False, H100) is None
    assert kernels.pick("lora_forward", 2048, 1024, 4096, R, torch.bfloat16, H100).CUBLAS
    assert not kernels.pick("lora_forward", 2048, 1024, 4096, 16, torch.bfloat16, H100).CUBLAS
