"""Which sizes the Hopper kernels serve, and with which of their own: a pure lookup."""

import itertools
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import hopper_lora  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402
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
            free = {"SIDES": (0, 4), "GROUP_M": range(1, 65), "FIRST": range(max(1, -(-M // 256)))}
            assert config is None or all(getattr(config, name) in values for name, values in free.items())
            assert config is None or replace(config, SIDES=4, GROUP_M=8, FIRST=0) == HopperConfig()
        served += any(config is not None for config in found)
        again = hopper_lora.backward_config.__wrapped__(M, Ns, K, R, facts)
        assert again == found[0]
    assert (served > 100) == (facts.arch == "sm90")


@pytest.mark.parametrize("M", [0, 1, 64, 128])
def test_too_few_tiles_are_left_to_others(M):
    for drop in (False, True):
        assert hopper_lora.forward_config(M, (4096,), 4096, 16, drop, H100) is None
    assert hopper_lora.backward_config(M, (4096,), 4096, 16, H100) is None
    assert not hopper_lora._worthwhile(M, 4096, H100)


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
        for R, some in ((limit, True), (limit + 1, False), (4 * limit + 1, False), (512, False)):
            found = [sides(hopper_lora.forward_config(M, (N,) * P, K, R, drop, H100)) for M, N, K in many]
            assert any(found) == some, (P, R, drop)
    for P in (1, 2, 3):
        for R, some in ((128, True), (129, False), (512, False)):
            found = [sides(hopper_lora.backward_config(M, (N,) * P, K, R, H100)) for M, N, K in many]
            assert any(found) == some, (P, R)


# of 32 blocks of rows, how many have a launch of their own: four programs draw a block each in 76 to 300
# microseconds, beside a GEMM of 350 to 1400
@pytest.mark.parametrize(
    ("Ns", "K", "R", "first"),
    [
        ((4096,), 4096, 16, 16),
        ((14336,), 4096, 16, 8),
        ((4096,), 14336, 16, 16),
        ((4096, 1024, 1024), 4096, 16, 16),
        ((4096,), 4096, 64, 20),
    ],
)
def test_side_programs_draw_as_much_of_a_mask_as_they_can_in_time(Ns, K, R, first):
    config = hopper_lora.forward_config(8192, Ns, K, R, True, H100)
    assert (config.SIDES, config.FIRST) == (4, first)


def test_a_mask_is_drawn_in_one_launch_where_that_is_faster():
    # two waves of tiles leave little time; or two projections, for which side programs cost another wave; or
    # as many ranks as make a step of theirs three of a tile
    cases = [(2048, (4096,), 16), (8192, (1024,), 16), (8192, (14336, 14336), 16), (8192, (4096,), 128)]
    for M, Ns, R in cases:
        assert hopper_lora.forward_config(M, Ns, 4096, R, True, H100).SIDES == 0


def test_more_rows_have_a_launch_of_their_own_the_slower_a_mask_is_drawn(monkeypatch):
    found = []
    for step in (0.1, 1.0, 1.25, 100.0):
        monkeypatch.setitem(hopper_lora._DRAWN_SIDE, 16, step)
        config = hopper_lora.forward_config.__wrapped__(8192, (4096,), 4096, 16, True, H100)
        found.append(config.FIRST if config.SIDES else 32)
    assert found == sorted(set(found))
    assert (found[0], found[3]) == (0, 32)


@pytest.mark.parametrize("R", [64, 128])
def test_many_ranks_beside_few_tiles_are_left_to_cublas(R):
    assert hopper_lora.forward_config(2048, (1024,), 4096, R, False, H100) is None
    assert kernels.pick("lora_forward", 2048, 1024, 4096, R, torch.bfloat16, H100).CUBLAS
    assert not kernels.pick("lora_forward", 2048, 1024, 4096, 16, torch.bfloat16, H100).CUBLAS
