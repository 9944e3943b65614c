"""Configs: values, patterns and targets, with PEFT's matching rules as the oracle."""

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

import lowrank_ops as lo
from lowrank_ops.config import pattern_key, selects

NAMES = ["q_proj", "model.layers.0.q_proj", "model.layers.10.mlp.up_proj", "xq_proj", "0", "1.0", "lm_head"]

PATTERNS = [
    ["q_proj"],
    ["proj"],
    [r".*_proj"],
    ["up_proj", ".*"],
    [r"^q_proj"],
    [r"layers\.\d+\.q_proj"],
    ["0", "layers"],
]
TARGETS = [["q_proj"], ["0"], ["layers.0.q_proj", "lm_head"], r".*proj", r"model\..*\.(q|up)_proj"]


def test_defaults_are_those_of_the_api():
    defaults = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
    }
    # by position too
    assert list(asdict(lo.LoRAConfig()).items()) == list(defaults.items())


def test_scale_is_alpha_over_r():
    assert lo.LoRAConfig(r=64, lora_alpha=32).scale == 0.5


def test_rank_stabilised_scale_is_alpha_over_the_root_of_r():
    assert lo.LoRAConfig(r=64, lora_alpha=32, use_rslora=True).scale == 4.0


def test_a_config_cannot_be_changed():
    config = lo.LoRAConfig(rank_pattern={"q_proj": 4})
    with pytest.raises(FrozenInstanceError):
        config.r = 4
    with pytest.raises(TypeError, match="frozen"):
        config.rank_pattern["q_proj"] = 8
    with pytest.raises(TypeError, match="frozen"):
        config.rank_pattern.update(q_proj=8)
    assert config.rank_pattern == {"q_proj": 4}


def test_a_config_does_not_follow_the_dict_it_was_made_from():
    pattern = {"q_proj": 4}
    config = lo.LoRAConfig(rank_pattern=pattern)
    pattern["q_proj"] = 8
    assert config.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), replace])
def test_copies_are_equal_and_hash_alike(clone):
    config = lo.LoRAConfig(target_modules=["q_proj"], rank_pattern={"q": 4, "k": 8}, alpha_pattern={"q": 1.5})
    assert clone(config) == config
    assert hash(clone(config)) == hash(config)
    assert list(clone(config).rank_pattern) == ["q", "k"]


def test_targets_keep_their_order_and_sets_are_sorted():
    assert lo.LoRAConfig(target_modules=["v", "q", "v"]).target_modules == ("v", "q")
    assert lo.LoRAConfig(target_modules={"v", "q"}).target_modules == ("q", "v")
    assert lo.LoRAConfig(target_modules="All-Linear").target_modules == "all-linear"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keys", PATTERNS, ids=str)
def test_patterns_match_as_in_peft(keys, name):
    expected = get_pattern_key(keys, name)
    assert pattern_key(dict.fromkeys(keys, 1), name) == (expected if expected in keys else None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_match_as_in_peft(targets, name):
    expected = bool(check_target_module_exists(LoraConfig(target_modules=targets), name))
    assert selects(lo.LoRAConfig(target_modules=targets).target_modules, name) == expected


def test_a_layer_takes_the_first_pattern_that_matches():
    ranks, alphas = {"q_proj": 4, ".*_proj": 16}, {"up_proj": 4}
    config = lo.LoRAConfig(r=2, lora_alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    assert config.for_layer("layers.0.q_proj").r == 4
    assert config.for_layer("layers.0.up_proj").scale == 4 / 16
    assert config.for_layer("lm_head").scale == 8 / 2
    assert not config.for_layer("lm_head").rank_pattern


def test_numbers_of_numpy_are_stored_as_those_of_python():
    options = {"r": np.int64(4), "lora_alpha": np.float32(0.5), "lora_dropout": np.float64(0.25)}
    config = lo.LoRAConfig(**options, rank_pattern={"q": np.int32(2)})
    values = (config.r, config.lora_alpha, config.lora_dropout, config.rank_pattern["q"])
    assert values == (4, 0.5, 0.25, 2)
    assert [type(value) for value in values] == [int, float, float, int]
