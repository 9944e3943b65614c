"""One training step of four decoder layers of Llama-3-8B, all seven linears adapted, against PEFT.

The layers are those of transformers with random weights: no vocabulary, no checkpointing. x stands for the
embedded tokens and requires a gradient for every provider, so that all run the same chain of dx.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowrank_ops as lo

from ..case import Layer
from ..step_case import StepCase, StepCell, StepProvider

__all__ = ["CASE", "MODELS"]

SCALE = 2.0  # lora_alpha = 2 r
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

MODELS = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
_LAYERS = 4


def _config(cell: StepCell):
    from transformers import LlamaConfig

    return LlamaConfig(
        **MODELS[cell.model],
        num_hidden_layers=_LAYERS,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
    )


class Stack(nn.Module):
    """Decoder layers alone: x, cos and sin in, hidden states out. Causal, without padding.

    ``recompute``: keep of each layer its input only.
    """

    def __init__(self, config):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(_LAYERS))
        self.recompute = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, position_embeddings=(cos, sin), use_reentrant=False)
            else:
                x = layer(x, position_embeddings=(cos, sin))
        return x


class UnfusedLoRA(nn.Module):
    """A LoRA linear as one writes it, in the dtype of x."""

    def __init__(self, base: nn.Linear, R: int):
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.a = nn.Parameter(torch.empty(R, base.in_features, **like))
        self.b = nn.Parameter(torch.empty(base.out_features, R, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * F.linear(F.linear(x, self.a), self.b)


def make_inputs(cell: StepCell, generator: torch.Generator) -> dict[str, Tensor]:
    """Return x, dy, cos, sin, the weights by their names in a Stack, and NAME.a and NAME.b of each linear.

    Normal, sized so that base and update are of one order and b is not zero; all in the dtype of the cell.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=cell.device, dtype=cell.dtype).mul_(std)

    config = _config(cell)
    with torch.device("meta"):
        stack = Stack(config)
    x = normal(cell.batch, cell.length, config.hidden_size)
    tensors = {"x": x, "dy": normal(*x.shape)}
    with torch.device(cell.device):
        positions = torch.arange(cell.length)[None]
        tensors["cos"], tensors["sin"] = LlamaRotaryEmbedding(config)(x, positions)
    for name, parameter in stack.named_parameters():
        if parameter.dim() == 1:
            tensors[name] = 1 + normal(*parameter.shape, std=0.1)  # of a norm
            continue
        N, K = parameter.shape
        tensors[name] = normal(N, K, std=K**-0.5)
        linear = name.removesuffix(".weight")
        tensors[f"{linear}.a"] = normal(cell.R, K, std=K**-0.5)
        tensors[f"{linear}.b"] = normal(N, cell.R, std=0.5 * cell.R**-0.5)
    x.requires_grad_()
    return tensors


def _stack(cell: StepCell, t: dict[str, Tensor]) -> Stack:
    """Return the frozen model, which holds the weights of ``t`` themselves."""
    with torch.device("meta"):
        stack = Stack(_config(cell))
    stack.load_state_dict({name: t[name] for name in stack.state_dict()}, assign=True)
    return stack.requires_grad_(False).train()


def _bound(stack: nn.Module, t: dict[str, Tensor], adapters: dict[str, nn.Parameter]) -> Layer:
    return Layer(lambda: stack(t["x"], t["cos"], t["sin"]), {"x": t["x"], **adapters})


def _filled(
    stack: nn.Module, t: dict[str, Tensor], ends: tuple[str, str], dtype: torch.dtype | None
) -> dict[str, nn.Parameter]:
    """Put copies of the adapters of ``t`` into what trains in ``stack`` and return that by its name in ``t``.

    ``ends``: what the parameters' names have after that of the linear, for a and for b. ``dtype``: of the
    adapters; None leaves the choice to whoever made them.
    """
    found = {}
    for name, parameter in stack.named_parameters():
        if not parameter.requires_grad:
            continue
        letter = "a" if name.endswith(ends[0]) else "b"
        key = f"{name.removesuffix(ends['ab'.index(letter)])}.{letter}"
        parameter.data = t[key].detach().to(dtype or parameter.dtype, copy=True)
        found[key] = parameter
    return found


def _adapted(
    cell: StepCell, t: dict[str, Tensor], dtype: torch.dtype | None, impl: str = "auto"
) -> tuple[Stack, dict[str, nn.Parameter]]:
    stack = _stack(cell, t)
    options = {"r": cell.R, "lora_alpha": SCALE * cell.R, "lora_dropout": cell.dropout_p}
    lo.inject(stack, lo.LoRAConfig(**options, target_modules="all-linear"))
    for module in stack.modules():
        if isinstance(module, lo.FusedLoRALinear):
            module.impl = impl
    return stack, _filled(stack, t, (".adapter.a", ".adapter.b"), dtype)


def baseline(cell: StepCell, t: dict[str, Tensor]) -> Layer:
    """Return the definition in the dtype of x; with dropout, the reference under the mask of lowrank_ops."""
    if cell.dropout_p:
        stack, adapters = _adapted(cell, t, t["x"].dtype, impl="reference")
    else:
        stack = _stack(cell, t)
        for parent in list(stack.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, UnfusedLoRA(child, cell.R))
        adapters = _filled(stack, t, (".a", ".b"), t["x"].dtype)
    # in float32 attention keeps all its scores
    stack.recompute = True
    return _bound(stack, t, adapters)


def _compile(stack: nn.Module, compiled: bool) -> nn.Module:
    return torch.compile(stack, dynamic=False) if compiled else stack


def _frozen(cell: StepCell, t: dict[str, Tensor], compiled: bool = False) -> Layer:
    return _bound(_compile(_stack(cell, t), compiled), t, {})


def _peft(cell: StepCell, t: dict[str, Tensor], fp32: bool, compiled: bool = False) -> Layer:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=cell.R,
        lora_alpha=SCALE * cell.R,
        lora_dropout=cell.dropout_p,
        target_modules=_LINEARS,
    )
    # the wrapper's own forward pass is left out: nothing in it is of use here
    stack = get_peft_model(_stack(cell, t), config, autocast_adapter_dtype=fp32).get_base_model()
    adapters = _filled(stack, t, (".lora_A.default.weight", ".lora_B.default.weight"), None)
    return _bound(_compile(stack, compiled), t, adapters)


def _ours(cell: StepCell, t: dict[str, Tensor], fp32: bool, compiled: bool = False) -> Layer:
    stack, adapters = _adapted(cell, t, None if fp32 else cell.dtype)
    return _bound(_compile(stack, compiled), t, adapters)


def _headline(cell: StepCell) -> bool:
    # compiling takes longer than timing all the others: only where the comparison is made
    return cell.device == "cuda" and cell.M == 8192


def _compiled(name: str, build) -> StepProvider:
    # deterministic mode, which poisons, would make it compile a second time
    return StepProvider(name, build, poison=False, compiled=True, by_default=_headline)


CASE = StepCase(
    name="llama_step",
    floor="frozen",
    compiled_floor="frozen_compiled",
    model="llama-3-8b",
    quick_model="tiny",
    shapes={"2x4096": (2, 4096), "1x1024": (1, 1024)},
    quick_shapes={"2x16": (2, 16), "1x8": (1, 8)},
    ranks=(16,),
    dropouts=(0.0, 0.05),
    seconds=300.0,
    providers=(
        StepProvider("frozen", _frozen),
        StepProvider("peft_fp32", partial(_peft, fp32=True)),
        StepProvider("peft", partial(_peft, fp32=False)),
        StepProvider("ours_fp32", partial(_ours, fp32=True), same_mask=True),
        StepProvider("ours", partial(_ours, fp32=False), same_mask=True),
        _compiled("frozen_compiled", partial(_frozen, compiled=True)),
        _compiled("peft_compiled", partial(_peft, fp32=False, compiled=True)),
        _compiled("ours_compiled", partial(_ours, fp32=False, compiled=True)),
    ),
    make_inputs=make_inputs,
    baseline=baseline,
)
