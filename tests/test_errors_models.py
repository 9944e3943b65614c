"""Every message of the model side, as sentence -> call; what a failure leaves alone is tested elsewhere."""

import re

import pytest
import torch
from tiny_models import injected_mlp, tiny_mlp
from torch import nn

import lowrank_ops as lo

INF, NAN = float("inf"), float("nan")
CONFIGS = {
    "LoRAConfig: r must be an int, got bool": {"r": True},
    "LoRAConfig: r must be an int, got float": {"r": 8.0},
    "LoRAConfig: r must be in 1..512, got 0": {"r": 0},
    "LoRAConfig: r must be in 1..512, got 513": {"r": 513},
    "LoRAConfig: lora_alpha must be a number, got str": {"lora_alpha": "32"},
    "LoRAConfig: lora_alpha must be a number, got bool": {"lora_alpha": True},
    "LoRAConfig: lora_alpha must be positive and finite, got nan": {"lora_alpha": NAN},
    "LoRAConfig: lora_alpha must be positive and finite, got inf": {"lora_alpha": INF},
    "LoRAConfig: lora_alpha must be positive and finite, got 0": {"lora_alpha": 0},
    "LoRAConfig: lora_alpha must be positive and finite, got a number that no": {"lora_alpha": 10**400},
    "LoRAConfig: lora_dropout must be in [0, 1), got 1": {"lora_dropout": 1},
    "LoRAConfig: lora_dropout must be in [0, 1), got -0.1": {"lora_dropout": -0.1},
    "LoRAConfig: lora_dropout must be in [0, 1), got nan": {"lora_dropout": NAN},
    "LoRAConfig: lora_dropout must be a number, got NoneType": {"lora_dropout": None},
    "LoRAConfig: use_rslora must be a bool, got int": {"use_rslora": 1},
    'LoRAConfig: bias must be "none", "all" or "lora_only", got \'some\'': {"bias": "some"},
    'LoRAConfig: bias must be "none", "all" or "lora_only", got True': {"bias": True},
    "LoRAConfig: target_modules must name a module, got ''": {"target_modules": ""},
    "LoRAConfig: target_modules must name a module, got an empty list": {"target_modules": []},
    "LoRAConfig: target_modules must hold strings, got int": {"target_modules": [3]},
    "LoRAConfig: target_modules must hold module names, got ''": {"target_modules": ["q_proj", ""]},
    "LoRAConfig: target_modules must be a string or a list of strings, got": {"target_modules": None},
    "LoRAConfig: target_modules must be a regular expression, got '('": {"target_modules": "("},
    "LoRAConfig: rank_pattern must be a dict, got list": {"rank_pattern": []},
    "LoRAConfig: rank_pattern must have strings as keys, got int": {"rank_pattern": {0: 4}},
    "LoRAConfig: rank_pattern must be a regular expression, got '*'": {"rank_pattern": {"*": 4}},
    "LoRAConfig: rank_pattern['q'] must be in 1..512, got 1024": {"rank_pattern": {"q": 1024}},
    "LoRAConfig: rank_pattern['q'] must be an int, got float": {"rank_pattern": {"q": 4.0}},
    "LoRAConfig: alpha_pattern['q'] must be positive and finite, got nan": {"alpha_pattern": {"q": NAN}},
}


@pytest.mark.parametrize(("message", "options"), CONFIGS.items(), ids=CONFIGS)
def test_a_bad_option_is_named(message, options):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        lo.LoRAConfig(**options)


def inject(make, **options):
    return lambda: lo.inject(make(), lo.LoRAConfig(**options))


def linear():
    return nn.Linear(6, 8)


def save(make, folder=""):
    return lambda: lo.save_adapter(make(), folder)


def encoder():
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)


def attention():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)})


def overridden():
    model = tiny_mlp()
    model[0].forward = lambda x: x
    return model


def quantised():
    model = tiny_mlp()
    model[0].weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    return model


def subclassed():
    class Packed(nn.Parameter):
        pass

    model = tiny_mlp()
    model[0].weight = Packed(torch.zeros(8, 6))
    return model


def bypassed(parent, child):
    kind = type(parent, (nn.ModuleDict,), {})
    return lambda: nn.ModuleDict({"mixer": kind({child: nn.Linear(6, 6)})})


def conv():
    return nn.Sequential(type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})())


def four_bit():
    return nn.Sequential(type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn"})(6, 6))


def of_two_configs():
    first, second = (injected_mlp(lora_dropout=p) for p in (0.0, 0.5))
    return nn.ModuleList([first, second])


def on_meta():
    return injected_mlp().to("meta")


FLOATS = "float16, bfloat16, float32 or float64"
INJECTIONS = {
    "model must be an nn.Module, got str": inject(str),
    "model must contain linear layers, got a bare Linear; use FusedLoRALinear.from_linear": inject(linear),
    "model must contain an nn.Linear, got a GELU without one": inject(nn.GELU),
    "config must be one of DenseLoRAConfig, LoRAConfig, LoRIConfig, ": lambda: lo.inject(
        tiny_mlp(), {"r": 4}
    ),
    "target_modules must match modules of the model, got 'inear1'; close names are linear1": inject(
        encoder, target_modules=["inear1"]
    ),
    "target_modules must match modules of the model, got '3'": inject(tiny_mlp, target_modules=["0", "3"]),
    "target_modules must match modules of the model, got 'self'; a string is a regular expression": inject(
        encoder, target_modules="self"
    ),
    "target '1' must be a plain nn.Linear, got GELU": inject(tiny_mlp, target_modules=["1"]),
    "target 'attention.out_proj' must be a plain nn.Linear, got NonDynamicallyQuantizableLinear": inject(
        attention, target_modules=["out_proj"]
    ),
    f"target '0' must have a weight of {FLOATS}, got Parameter of torch.int8": inject(quantised),
    f"target '0' must have a weight of {FLOATS}, got Packed of torch.float32": inject(subclassed),
    "target '0' must have no hooks and no forward of its own, got some": inject(overridden),
    "target 'linear1' must be called by its parent, got TransformerEncoderLayer, whose fast": inject(encoder),
    "target 'mixer.out_proj' must be called by its parent, got BambaMixer, which reads its weight": inject(
        bypassed("BambaMixer", "out_proj")
    ),
    "target 'mixer.q_proj' must be called by its parent, got WavLMAttention, which": inject(
        bypassed("WavLMAttention", "q_proj")
    ),
    "model must contain an nn.Linear, got a Sequential without one; Conv1D of transformers is": inject(conv),
    "model must contain an nn.Linear, got a Sequential without one; Linear4bit of bits": inject(four_bit),
    "model must have no adapters, got 2 fused layers, first '0'; eject it first": inject(injected_mlp),
}
CALLS = {
    **{f"inject: {message}": call for message, call in INJECTIONS.items()},
    "from_linear: linear must be a plain nn.Linear, got GELU": (
        lambda: lo.FusedLoRALinear.from_linear(nn.GELU(), lo.LoRAConfig())
    ),
    "from_linear: config must be one of LoRAConfig, SALORConfig, got NoneType": (
        lambda: lo.FusedLoRALinear.from_linear(linear(), None)
    ),
    "merge: model must have fused layers, got a Sequential without": lambda: lo.merge(tiny_mlp()),
    "unmerge: model must have fused layers, got a Sequential without": lambda: lo.unmerge(tiny_mlp()),
    "eject: model must have fused layers, got a Sequential without": lambda: lo.eject(tiny_mlp()),
    "merge: model must be an nn.Module, got NoneType": lambda: lo.merge(None),
    "report: model must be an nn.Module, got int": lambda: lo.report(3),
    "from_peft: peft_model must be a PeftModel, got Sequential": lambda: lo.from_peft(tiny_mlp()),
    "save_adapter: model must contain fused layers, got a Sequential without": save(tiny_mlp),
    "save_adapter: model must hold data, got base_model.model.0.lora_A.weight on meta": save(on_meta),
    "save_adapter: folder must be a directory, got the file": save(injected_mlp, __file__),
    "save_adapter: folder must be a directory that can be written, got": save(injected_mlp, f"{__file__}/a"),
    "save_adapter: folder must be a str or a path, got NoneType": save(injected_mlp, None),
    "load_adapter: folder must be a str or a path, got int": lambda: lo.load_adapter(tiny_mlp(), 3),
    "save_adapter: fused layers must share one config, got 2 different ones": save(of_two_configs),
    "load_adapter: model must contain linear layers, got a bare Linear": (
        lambda: lo.load_adapter(linear(), "")
    ),
    "load_adapter: folder must be a directory on this machine, got 'someone/adapter'": (
        lambda: lo.load_adapter(tiny_mlp(), "someone/adapter")
    ),
}


@pytest.mark.parametrize(("message", "call"), CALLS.items(), ids=CALLS)
def test_a_bad_call_gets_one_sentence(message, call):
    kinds = (TypeError, ValueError, FileNotFoundError, NotADirectoryError)
    with pytest.raises(kinds, match=f"^{re.escape(message)}") as caught:
        call()
    assert "\n" not in str(caught.value)
