"""GeLoRA: dimensions against other programs' numbers, ranks against the rule, models left as they were."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from neighbor_points import SETS, assert_exact, make_points
from tiny_models import VOCABULARY, assert_untouched, fingerprint, stir, tiny_llama, tokens
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops import reference
from lowrank_ops.functional import nearest_neighbors
from lowrank_ops.gelora import _dimension, intrinsic_dimension, select_ranks
from lowrank_ops.gelora_ranks import within_budget
from lowrank_ops.gelora_states import pool, pooled_states

EXAMPLES = 24


def gaussian_points() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2000, 5)))


def test_a_gaussian_has_the_dimensions_that_dadapy_and_scikit_dimension_find():
    points = gaussian_points()
    fit = intrinsic_dimension(points)
    assert fit == pytest.approx(5.100903, abs=1e-6)  # DADApy
    assert fit == pytest.approx(5.092549, rel=2e-3)  # scikit-dimension, which counts from zero
    assert intrinsic_dimension(points, estimator="mle") == pytest.approx(5.112240, abs=1e-6)
    assert intrinsic_dimension(points.float()) == pytest.approx(5.100903, rel=1e-5)


def test_ratios_drawn_from_their_law_give_its_exponent():
    ratios = torch.from_numpy(np.random.default_rng(1).random(100_000) ** (-1 / 7))
    assert _dimension(ratios, "fit", 0.1) == pytest.approx(6.9984, abs=1e-4)
    assert _dimension(ratios, "mle", 0.1) == pytest.approx(6.9966, abs=1e-4)


@pytest.mark.parametrize(("d", "expected", "spread"), [(5, 4.70, 0.14), (10, 8.63, 0.24), (20, 15.2, 0.35)])
def test_cubes_in_many_dimensions_are_underestimated_as_is_known(d, expected, spread):
    generator = torch.Generator().manual_seed(d)
    basis = torch.linalg.qr(torch.randn(768, d, generator=generator)).Q
    points = torch.rand(2000, d, generator=generator) @ basis.T
    # the spread is of one standard deviation, over samples
    assert abs(intrinsic_dimension(points) - expected) <= 3 * spread


def test_neither_place_nor_scale_nor_copies_change_the_dimension():
    points = gaussian_points()[:500]
    expected = intrinsic_dimension(points)
    assert intrinsic_dimension(points * 1e-3 + 7) == pytest.approx(expected, rel=1e-6)
    assert intrinsic_dimension(torch.cat([points, points[:100], points[:50]])) == expected
    assert intrinsic_dimension(points[torch.randperm(500)]) == pytest.approx(expected, rel=1e-12)


def test_what_fit_discards_are_the_largest_ratios():
    points = gaussian_points()[:300]
    dimensions = [intrinsic_dimension(points, discard=share) for share in (0.0, 0.1, 0.5)]
    assert len(set(dimensions)) == 3
    assert all(3 < dimension < 7 for dimension in dimensions)
    assert intrinsic_dimension(points, "mle", discard=0.5) == intrinsic_dimension(points, "mle")


@pytest.mark.parametrize("name", SETS)
def test_the_reference_is_exact_however_close_the_points(name):
    points = make_points(name, 200, 33)
    assert_exact(nearest_neighbors(points), points)


def test_the_reference_takes_blocks_of_rows(monkeypatch):
    points = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0))
    cdist, rows = torch.cdist, []
    monkeypatch.setattr(torch, "cdist", lambda a, b, **kw: rows.append(len(a)) or cdist(a, b, **kw))
    first, second = reference.nearest_neighbors(points)
    assert len(rows) > 1
    assert max(rows) * 5000 <= 2**24
    assert sum(rows) == 5000
    assert (first <= second).all()


BAD_POINTS = {
    "intrinsic_dimension: points must be a Tensor, got list": lambda: intrinsic_dimension([[0.0]]),
    "intrinsic_dimension: points must be float16, bfloat16, float32 or float64, got torch.int64": (
        lambda: intrinsic_dimension(torch.zeros(5, 2, dtype=torch.int64))
    ),
    "intrinsic_dimension: points must be (M, K), got (5,)": lambda: intrinsic_dimension(torch.zeros(5)),
    "intrinsic_dimension: points must be (M, K) with M >= 3 and K >= 1, got (2, 4)": (
        lambda: intrinsic_dimension(torch.rand(2, 4))
    ),
    "intrinsic_dimension: points must be finite, got infinity or NaN among them": (
        lambda: intrinsic_dimension(torch.full((5, 2), torch.nan))
    ),
    "intrinsic_dimension: points must hold at least 3 distinct ones, got 2 among 6": (
        lambda: intrinsic_dimension(torch.eye(2).repeat(3, 1))
    ),
    "intrinsic_dimension: points must have second neighbours farther than first ones, got none": (
        lambda: intrinsic_dimension(torch.eye(4))
    ),
    "intrinsic_dimension: points must be distances apart that float32 holds, got": (
        lambda: intrinsic_dimension(torch.tensor([[0.0], [3e38], [-3e38]]))
    ),
    'intrinsic_dimension: estimator must be "fit" or "mle", got \'map\'': (
        lambda: intrinsic_dimension(torch.rand(5, 2), "map")
    ),
    "intrinsic_dimension: discard must be in [0, 1), got 1": (
        lambda: intrinsic_dimension(torch.rand(5, 2), discard=1)
    ),
    "intrinsic_dimension: discard must be a number, got str": (
        lambda: intrinsic_dimension(torch.rand(5, 2), discard="0.1")
    ),
}


@pytest.mark.parametrize(("message", "call"), BAD_POINTS.items(), ids=BAD_POINTS)
def test_bad_points_are_named(message, call):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        call()


BAD_OPTIONS = {
    "GeLoRAConfig: offset must be at least 1, got 0": {"offset": 0},
    "GeLoRAConfig: offset must be an int, got float": {"offset": 1.0},
    "GeLoRAConfig: max_points must be at least 3, got 2": {"max_points": 2},
    "GeLoRAConfig: budget must be at least 1, got 0": {"budget": 0},
    "GeLoRAConfig: budget must be an int, got bool": {"budget": True},
    'GeLoRAConfig: estimator must be "fit" or "mle", got \'map\'': {"estimator": "map"},
    'GeLoRAConfig: pooling must be "mean" or "last", got \'max\'': {"pooling": "max"},
    "GeLoRAConfig: blocks must be a string or None, got int": {"blocks": 3},
    "GeLoRAConfig: discard must be in [0, 1), got 1.5": {"discard": 1.5},
    "GeLoRAConfig: scale must be positive and finite, got 0": {"scale": 0},
    "GeLoRAConfig: lora_dropout must be in [0, 1), got 1": {"lora_dropout": 1},
    "GeLoRAConfig: target_modules must name a module, got ''": {"target_modules": ""},
}


@pytest.mark.parametrize(("message", "options"), BAD_OPTIONS.items(), ids=BAD_OPTIONS)
def test_a_bad_option_is_named(message, options):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        lo.GeLoRAConfig(**options)


def test_the_rule_gives_the_ranks_of_the_specification():
    assert lo.gelora.block_ranks([3.2, 7.9, 9.1, 8.4, 8.4, 12.03]) == [6, 3, 1, 1, 5]
    assert lo.gelora.block_ranks([3.2, 7.9, 9.1], offset=3) == [8, 5]
    assert lo.gelora.block_ranks([1.0, 2000.0]) == [512]


@pytest.mark.parametrize("budget", [60, 61, 200, 997, 10_000, 100_000])
def test_a_budget_is_reached_and_not_exceeded(budget):
    shares, costs = [1.0, 2.5, 1.0, 7.25], [10, 10, 30, 10]
    ranks = within_budget(shares, costs, budget)
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert all(1 <= rank <= 512 for rank in ranks)
    assert spent <= budget
    assert budget - spent < min(costs) or ranks == [512] * 4


def test_a_budget_is_shared_in_proportion():
    assert within_budget([1.0, 2.0, 3.0], [1, 1, 1], 60) == [10, 20, 30]
    assert within_budget([1.0, 1.0, 1.0], [4, 4, 4], 24) == [2, 2, 2]


def token_batches(count: int = EXAMPLES, size: int = 4, length: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(VOCABULARY, (count, length), generator=generator).split(size))


def states_of(model: nn.Module, batches, pooling: str = "mean", limit: int = EXAMPLES) -> list[Tensor]:
    return pooled_states(model, list(model.model.layers), batches, pooling, limit, progress=False)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_are_the_raw_outputs_of_the_blocks(pooling):
    model, ids = tiny_llama(), torch.cat(token_batches())
    states = states_of(model, token_batches(), pooling)
    with torch.no_grad():
        hidden = list(model(ids, output_hidden_states=True).hidden_states)
    pooled = [one.mean(1) if pooling == "mean" else one[:, -1] for one in hidden]
    for got, expected in zip(states[:-1], pooled[:-1], strict=True):
        torch.testing.assert_close(got, expected)
    # transformers' last state is behind the final norm
    if pooling == "last":
        torch.testing.assert_close(model.model.norm(states[-1]), pooled[-1])
    assert (states[-1] - pooled[-1]).abs().max() > 0.01


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_point(side, pooling):
    model, batches = tiny_llama(), token_batches()
    pad = torch.zeros(4, 3, dtype=torch.int64)
    padded = []
    for batch in batches:
        ids = torch.cat([pad, batch] if side == "left" else [batch, pad], 1)
        mask = torch.cat(
            [pad, torch.ones_like(batch)] if side == "left" else [torch.ones_like(batch), pad], 1
        )
        places = (mask.cumsum(1) - 1).clamp_min(0)
        padded.append({"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": ids})
    for got, expected in zip(
        states_of(model, padded, pooling), states_of(model, batches, pooling), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_pooling_takes_the_tokens_that_the_mask_keeps():
    states = torch.arange(12.0).view(2, 3, 2).bfloat16()
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert torch.equal(pool(states, mask, "mean"), torch.tensor([[1.0, 2.0], [10.0, 11.0]]))
    assert torch.equal(pool(states, mask, "last"), torch.tensor([[2.0, 3.0], [10.0, 11.0]]))
    with pytest.raises(ValueError, match="attention_mask must keep a token of every example"):
        pool(states, torch.zeros(2, 3), "mean")
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 3\), got \(3, 2\)"):
        pool(states, mask.T, "mean")


def test_batches_are_taken_one_by_one_and_no_more_than_needed():
    taken = []
    endless = (taken.append(1) or batch for batch in itertools.cycle(token_batches()))
    states = states_of(tiny_llama(), endless, limit=10)
    assert len(taken) == 3
    assert all(len(one) == 10 for one in states)


def selection(model: nn.Module | None = None, **options) -> lo.gelora.RankSelection:
    config = lo.GeLoRAConfig(**{"max_points": EXAMPLES, **options})
    return select_ranks(model or tiny_llama(), token_batches(), config)


def test_every_target_gets_the_rank_of_its_block():
    model = tiny_llama()
    ranks = selection(model)
    assert list(ranks.blocks) == ["model.layers.0", "model.layers.1"]
    assert len(ranks) == 8
    for name, rank in ranks.items():
        assert rank == ranks.block_ranks[int(name.split(".")[2])]
    states = states_of(model, token_batches())
    assert list(ranks.dimensions) == [intrinsic_dimension(one) for one in states]
    assert list(ranks.block_ranks) == lo.gelora.block_ranks(ranks.dimensions)
    assert ranks.points == EXAMPLES


def test_a_model_trains_what_its_selection_says():
    model = tiny_llama()
    config = lo.GeLoRAConfig(max_points=EXAMPLES, budget=5000, scale=1.5)
    ranks = select_ranks(model, token_batches(), config)
    lo.inject(model, config.lora_config(ranks))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lo.FusedLoRALinear)}
    assert {name: layer.adapter.rank for name, layer in layers.items()} == ranks
    assert {layer.adapter.scale for layer in layers.values()} == {1.5}
    assert lo.report(model).trainable == ranks.parameters <= 5000


def test_selecting_leaves_the_model_as_it_was():
    model = tiny_llama()
    model.model.layers[0].train()
    before, modes = fingerprint(model), [module.training for module in model.modules()]
    selection(model)
    for bad in ([tokens(), "text"], [torch.full((2, 7), VOCABULARY)]):
        with pytest.raises((TypeError, IndexError)):
            select_ranks(model, bad, lo.GeLoRAConfig())
    assert_untouched(before, model)
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_adapters_of_mixed_ranks_save_and_load_as_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    config = lo.GeLoRAConfig(budget=6000)
    # eight different ones, whatever the geometry
    ranks = {name: 1 + i for i, name in enumerate(selection(model))}
    stir(lo.inject(model, config.lora_config(ranks)))
    lo.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert len(fields["rank_pattern"]) == len(fields["alpha_pattern"]) == 7
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ours = lo.load_adapter(tiny_llama(), tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(ours(tokens()).logits, expected)
        torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def plain_stack() -> nn.Module:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, hidden_states):
            return (hidden_states + self.proj(hidden_states).relu(),)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.others = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x):
            for block in self.blocks:
                (x,) = block(hidden_states=x)
            return self.others[0](x)

    torch.manual_seed(0)
    return Stack()


def test_any_model_with_a_list_of_blocks_will_do():
    batches = list(torch.randn(40, 5, 6).split(8))
    ranks = select_ranks(plain_stack(), batches, lo.GeLoRAConfig(target_modules=["proj"]))
    assert list(ranks) == ["blocks.0.proj", "blocks.1.proj", "blocks.2.proj"]
    assert len(ranks.dimensions) == 4


def stack_with_a_renamed_input() -> nn.Module:
    model = plain_stack()
    rename = lambda module, args, kwargs: (args, {"x": kwargs["hidden_states"]})  # noqa: E731
    model.blocks[0].register_forward_pre_hook(rename, with_kwargs=True)
    return model


def select(model: nn.Module, batches: list, **options):
    return lambda: select_ranks(model, batches, lo.GeLoRAConfig(**options))


BAD_CALLS = {
    "select_ranks: model must be an nn.Module, got str": lambda: select_ranks("m", [], lo.GeLoRAConfig()),
    "select_ranks: config must be a GeLoRAConfig, got LoRAConfig": (
        lambda: select_ranks(tiny_llama(), [], lo.LoRAConfig())
    ),
    "select_ranks: batches must hold examples, got none": select(tiny_llama(), []),
    "select_ranks: batches must hold tensors of token ids or dicts, got list": select(tiny_llama(), [[1, 2]]),
    "select_ranks: target_modules must match modules of the model, got 'query'": (
        select(tiny_llama(), [], target_modules=["query"])
    ),
    "select_ranks: budget must be at least 448, which rank 1 everywhere takes, got 447": (
        select(tiny_llama(), [], budget=447)
    ),
    "select_ranks: blocks must name an nn.ModuleList of the model, model.layers, got 'layers'": (
        select(tiny_llama(), [], blocks="layers")
    ),
    "select_ranks: target_modules must lie in one list of blocks, model.layers, got 'lm_head'": (
        select(tiny_llama(), [], target_modules=["q_proj", "lm_head"])
    ),
    "select_ranks: target_modules must lie in one list of blocks, blocks or others, got": (
        select(plain_stack(), [], target_modules="all-linear")
    ),
    "select_ranks: hidden states must be (batch, tokens, K), got (5, 6)": (
        select(plain_stack(), [torch.randn(5, 6)], target_modules=["proj"])
    ),
    "select_ranks: hidden states must be (batch, tokens, K), got NoneType": (
        select(stack_with_a_renamed_input(), [torch.randn(2, 5, 6)], target_modules=["proj"])
    ),
    "intrinsic_dimension: points must be (M, K) with M >= 3 and K >= 1, got (2, 32)": (
        select(tiny_llama(), [tokens()])
    ),
    "select_ranks: model must have no adapters, got 8 fused layers": (
        select(lo.inject(tiny_llama(), lo.LoRAConfig(target_modules=r".*self_attn\.._proj")), [])
    ),
    "GeLoRAConfig: ranks must name a module, got an empty dict": lambda: lo.GeLoRAConfig().lora_config({}),
    "inject: config must be one of DenseLoRAConfig, LoRAConfig, LoRIConfig, ": (
        lambda: lo.inject(tiny_llama(), lo.GeLoRAConfig())
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD_CALLS.items(), ids=BAD_CALLS)
def test_a_bad_call_is_named(message, call):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        call()


def test_a_selection_is_reported_and_plotted(tmp_path):
    ranks = selection()
    table = lo.gelora.report(ranks)
    assert "model.layers.1" in table
    assert f"{ranks.parameters:,} parameters in 8 matrices; {EXAMPLES} points" in table
    lo.gelora.plot(ranks, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_progress_is_shown_to_those_who_ask(capsys):
    selection()
    assert capsys.readouterr() == ("", "")
    select_ranks(tiny_llama(), token_batches(), lo.GeLoRAConfig(max_points=EXAMPLES), progress=True)
    assert f"{EXAMPLES}/{EXAMPLES}" in capsys.readouterr().err
