"""Which entries go: every structure against its definition, over several tensors at once."""

import pytest
import torch

from lowrank_ops.salor_units import keep_components, keep_entries

SHAPES = [(6, 10), (1, 3), (5, 7)]


def make_scores(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in shapes]


def all_alive(scores):
    return [torch.ones_like(score, dtype=torch.bool) for score in scores]


def count(masks):
    return sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_largest_entries_of_all_tensors_together_stay(progress):
    scores = make_scores(SHAPES)
    kept = keep_entries("unstructured", scores, all_alive(scores), 0.8, progress)
    total = sum(score.numel() for score in scores)
    best = {score.max().item() for score in scores}
    # of each tensor the best entry stays; the others compete
    free = torch.cat([score[score < score.max()] for score in scores])
    left = total - round(progress * round(0.8 * total))
    threshold = free.sort(descending=True).values[left - len(SHAPES) - 1] if progress else -1
    for score, mask in zip(scores, kept, strict=True):
        expected = score >= threshold
        for value in best:
            expected |= score == value
        assert torch.equal(mask, expected)
    assert count(kept) == left


def test_what_is_gone_does_not_come_back():
    scores = make_scores(SHAPES)
    kept = keep_entries("unstructured", scores, all_alive(scores), 0.8, 0.5)
    others = make_scores(SHAPES, seed=1)
    later = keep_entries("unstructured", others, kept, 0.8, 0.6)
    assert count(later) < count(kept)
    assert not any((new & ~old).any() for new, old in zip(later, kept, strict=True))


def test_equal_scores_leave_the_first_of_them_and_something_of_every_tensor():
    scores = [torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(1, 4)]
    kept = keep_entries("unstructured", scores, all_alive(scores), 0.5, 1.0)
    assert [mask.flatten().int().tolist() for mask in kept] == [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


def test_scores_that_are_not_finite_are_ranked_and_nan_last():
    scores = [torch.tensor([[0.5, float("nan"), float("inf"), 1e38, 0.1, 0.2]])]
    kept = keep_entries("unstructured", scores, all_alive(scores), 0.5, 1.0)
    assert kept[0].int().tolist() == [[1, 0, 1, 1, 0, 0]]


def test_two_of_four_stay_along_the_last_axis_and_of_a_ragged_end_at_most_two():
    scores = make_scores([(5, 11), (3, 4), (2, 2)])
    kept = keep_entries("2:4", scores, all_alive(scores), 0.5, 1.0)
    for score, mask in zip(scores, kept, strict=True):
        for first in range(0, score.shape[1], 4):
            group = score[:, first : first + 4]
            places = group.topk(min(2, group.shape[1]), dim=1).indices
            expected = torch.zeros_like(group, dtype=torch.bool).scatter_(1, places, True)
            assert torch.equal(mask[:, first : first + 4], expected)


def test_on_the_way_to_two_of_four_the_least_of_what_will_go_goes_first():
    scores = make_scores([(4, 8)])
    (final,) = keep_entries("2:4", scores, all_alive(scores), 0.5, 1.0)
    (half,) = keep_entries("2:4", scores, all_alive(scores), 0.5, 0.5)
    going = scores[0][~final].sort().values
    assert torch.equal(~half, ~final & (scores[0] <= going[7]))
    # a group that lost one keeps it lost, whatever its score becomes
    (later,) = keep_entries("2:4", make_scores([(4, 8)], seed=1), [half], 0.5, 1.0)
    assert not (later & ~half).any()
    assert (later.view(4, 2, 4).sum(2) == 2).all()


def test_blocks_go_by_their_mean_also_at_a_ragged_edge():
    scores = make_scores([(20, 40), (16, 16)])
    kept = keep_entries("blocks", scores, all_alive(scores), 0.5, 1.0)
    means = {}
    for i, score in enumerate(scores):
        for row in range(0, score.shape[0], 16):
            for col in range(0, score.shape[1], 16):
                means[i, row, col] = score[row : row + 16, col : col + 16].mean().item()
    # the second tensor's only block stays
    order = sorted((key for key in means if key[0] == 0), key=means.get, reverse=True)
    stays = {(1, 0, 0), *order[: 7 - round(0.5 * 7) - 1]}
    for i, row, col in means:
        block = kept[i][row : row + 16, col : col + 16]
        assert (block == ((i, row, col) in stays)).all()


def test_components_go_by_the_norm_of_their_share_of_the_update():
    a, b = make_scores([(4, 6), (4, 6)]), make_scores([(5, 4), (5, 4)], seed=1)
    alive = [torch.ones(4, dtype=torch.bool)] * 2
    kept = keep_components(a, b, alive, 0.5, 1.0)
    norms = torch.cat(
        [
            torch.stack([torch.outer(y[:, c], x[c]).norm() for c in range(4)])
            for x, y in zip(a, b, strict=True)
        ]
    )
    expected = torch.zeros(8, dtype=torch.bool)
    expected[norms.topk(4).indices] = True
    assert torch.equal(torch.cat(kept), expected)
