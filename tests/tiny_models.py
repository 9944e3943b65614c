"""Small models for the tests of the model side, and what two of them can be compared by."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ops as lo

VOCABULARY = 40


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Return a random Llama of two layers, hidden size 32, four heads over two key-value heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **options, **changes)).eval()


def tiny_mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return two linear layers with biases around a GELU, 6 -> 8 -> 5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).to(dtype).eval()


def tokens(seed: int = 1) -> Tensor:
    """Return two sequences of seven tokens, (2, 7)."""
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def points(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Return inputs of ``tiny_mlp``, (4, 6)."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stir(model: nn.Module, seed: int = 2) -> nn.Module:
    """Give everything that trains random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def injected_mlp(**options) -> nn.Sequential:
    """Return ``tiny_mlp`` with stirred adapters of rank 3."""
    return stir(lo.inject(tiny_mlp(), lo.LoRAConfig(**{"r": 3, **options})))


def bits(tensor: Tensor) -> Tensor:
    """Return a copy of the bytes of ``tensor``."""
    return tensor.detach().clone().contiguous().view(torch.uint8)


def fingerprint(model: nn.Module) -> tuple:
    """Return all that a failed call must leave alone: objects, bits, what trains, the generator."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [
        (name, id(p), p.requires_grad, p.dtype, p.shape, None if p.is_meta else bits(p))
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return modules, parameters, torch.get_rng_state()


def assert_untouched(before: tuple, model: nn.Module) -> None:
    """Fail if ``model`` differs from the fingerprint in anything."""
    after = fingerprint(model)
    assert before[0] == after[0]
    assert [row[:-1] for row in before[1]] == [row[:-1] for row in after[1]]
    for old, new in zip(before[1], after[1], strict=True):
        assert old[-1] is None or torch.equal(old[-1], new[-1])
    assert torch.equal(before[2], after[2])
