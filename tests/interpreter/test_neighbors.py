"""The neighbour kernels against float64 differences, run by Triton's interpreter."""

import sys

import pytest
import torch
from neighbor_points import SETS, assert_exact, make_points

from lowrank_ops import kernels, reference
from lowrank_ops.kernels import _screen_neighbors

launcher = sys.modules["lowrank_ops.kernels.nearest_neighbors"]


@pytest.fixture
def searched(monkeypatch):
    """The numbers of points that were compared with all others."""
    counts = []
    search = launcher.search_all
    monkeypatch.setattr(
        launcher,
        "search_all",
        lambda points, rows, *rest: counts.append(len(rows)) or search(points, rows, *rest),
    )
    return counts


@pytest.mark.parametrize("name", SETS)
def test_neighbours_are_exact_however_close(name):
    points = make_points(name, 60, 37)
    assert_exact(kernels.nearest_neighbors(points), points)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_neighbours_of_16_bit_points_are_exact(dtype):
    points = make_points("near_duplicates", 48, 20).to(dtype)
    assert_exact(kernels.nearest_neighbors(points), points)


@pytest.mark.parametrize("M", [3, 8, 9, 10, 33])
def test_a_handful_of_points_is_enough(M):
    points = torch.randn(M, 3, generator=torch.Generator().manual_seed(M))
    assert_exact(kernels.nearest_neighbors(points), points)


def test_points_that_screening_tells_apart_are_not_searched_for(searched):
    kernels.nearest_neighbors(make_points("gaussian", 100, 64))
    assert searched == []


def test_a_cluster_spread_over_shares_is_measured_and_not_searched_for(searched):
    points = make_points("gaussian", 60, 16)
    points[::6] = points[0] + 1e-5 * points[::6]
    assert_exact(kernels.nearest_neighbors(points), points)
    assert searched == []


def test_points_that_screening_cannot_tell_apart_are_compared_with_all(searched):
    kernels.nearest_neighbors(make_points("tight_clusters", 80, 64))
    assert searched == [80]


def test_points_may_have_any_strides():
    points = make_points("gaussian", 40, 20)
    expected = kernels.nearest_neighbors(points)
    for strided in (points.T.contiguous().T, torch.stack([points, points], 2)[..., 0]):
        assert all(map(torch.equal, kernels.nearest_neighbors(strided), expected))


def test_two_runs_give_the_same_bits():
    points = make_points("tight_clusters", 50, 20)
    runs = [kernels.nearest_neighbors(points) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("processors", [1, 8, 1000])
def test_candidates_do_not_depend_on_how_columns_are_shared(processors):
    points = make_points("gaussian", 100, 16)
    config = _screen_neighbors.pick_screen("cpu")
    rounded, square, _ = _screen_neighbors.round_points(points, torch.zeros(16), 1.0, config)
    facts = kernels.DeviceFacts(arch="cpu", processors=processors)
    keys = _screen_neighbors.screen(rounded, square, 100, config, facts)
    distances = torch.cdist(points.half().double(), points.half().double()).fill_diagonal_(torch.inf)
    expected = distances.topk(config.KEPT, largest=False, sorted=True).indices
    nearest = keys.topk(config.KEPT, largest=False, sorted=True).values
    assert torch.equal(nearest & 0xFFFFFFFF, expected)


def test_the_reference_is_blocked_and_exact(monkeypatch):
    points = make_points("near_duplicates", 60, 37)
    whole = reference.nearest_neighbors(points)
    assert_exact(whole, points)
    cdist, rows = torch.cdist, []
    monkeypatch.setattr(torch, "cdist", lambda a, b, **kw: rows.append(len(a)) or cdist(a, b, **kw))
    many = torch.zeros(5000, 1)
    reference.nearest_neighbors(many)
    assert max(rows) * 5000 <= 2**24
