"""What only a GPU can show of GeLoRA: compiled neighbour kernels, their memory, and ranks that share them."""

import pytest
import torch
from neighbor_points import SETS, assert_exact, make_points
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.functional import nearest_neighbors

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [(2000, 577), (301, 64), (40, 5)], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_neighbours_are_exact_however_close(name, shape):
    points = make_points(name, *shape, "cuda")
    assert_exact(nearest_neighbors(points), points)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "near_duplicates", "tight_clusters"])
def test_neighbours_of_16_bit_points_are_exact(name, dtype):
    points = make_points(name, 1500, 256, "cuda").to(dtype)
    assert_exact(nearest_neighbors(points), points)


def test_two_runs_give_the_same_bits():
    for name in ("gaussian", "tight_clusters"):
        points = make_points(name, 3000, 256, "cuda")
        first, second = nearest_neighbors(points), nearest_neighbors(points)
        assert all(map(torch.equal, first, second))


def test_points_may_have_any_strides():
    points = make_points("gaussian", 500, 96, "cuda")
    for strided in (points.T.contiguous().T, torch.stack([points, points], 2)[..., 0]):
        assert_exact(nearest_neighbors(strided), points)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_thousand_wide_points_take_less_than_a_gibibyte(dtype):
    points = torch.randn(20_000, 4096, device="cuda", dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_neighbors(points)
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_the_dimension_is_that_of_the_reference():
    points = make_points("gaussian", 2000, 12)
    for estimator in ("fit", "mle"):
        on_gpu = lo.gelora.intrinsic_dimension(points.cuda(), estimator)
        assert on_gpu == pytest.approx(lo.gelora.intrinsic_dimension(points.double(), estimator), rel=1e-4)


def compiled_for(ranks: list[int], x: Tensor) -> dict[str, int]:
    mixed_ranks = pytest.importorskip("benchmarks.mixed_ranks")
    before = mixed_ranks.compilations()
    mixed_ranks.step(mixed_ranks.make_model(ranks, x.shape[1], "cuda", torch.bfloat16), x)
    return {name: n - before.get(name, 0) for name, n in mixed_ranks.compilations().items()}


@pytest.mark.parametrize("name", ["1 to 31", "1 to 511"])
def test_thirty_ranks_share_a_handful_of_compilations(name):
    mixed_ranks = pytest.importorskip("benchmarks.mixed_ranks")
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    compiled = compiled_for(mixed_ranks.RANKS[name], x)
    # of each kernel; these serve two ops each, _sum_parts_kernel all
    allowed = dict.fromkeys(
        ("_project_kernel", "_correlate_kernel", "_extended_matmul_kernel", "hopper_kernel"), 10
    )
    assert not {kernel: n for kernel, n in compiled.items() if n > allowed.get(kernel, 5)}
