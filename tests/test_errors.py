"""Bad arguments of lora_linear get one sentence: the argument, what was expected, what came."""

import inspect
import re

import pytest
import torch

from lowrank_ops import lora_linear, reference


def arguments(**changed) -> dict:
    good = {
        "x": torch.ones(3, 8),
        "w": torch.ones(4, 8),
        "a": torch.ones(2, 8),
        "b": torch.ones(4, 2),
        "bias": torch.ones(4),
    }
    return good | changed


ONE = torch.ones
CASES = [
    ({"x": ONE(3, 7)}, ValueError, "x must be (..., K) with K = 8 as in w, got (3, 7)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must be (..., K), got ()"),
    ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    ({"w": ONE(4, 8, 1)}, ValueError, "w must be (N, K), got (4, 8, 1)"),
    ({"w": None}, TypeError, "w must be a Tensor, got NoneType"),
    ({"a": ONE(2, 7)}, ValueError, "a must be (R, K) = (2, 8), got (2, 7)"),
    ({"a": ONE(8)}, ValueError, "a must be (R, K), got (8,)"),
    ({"a": ONE(0, 8), "b": ONE(4, 0)}, ValueError, "a must be (R, K) with 1 <= R <= 512, got (0, 8)"),
    ({"a": ONE(513, 8), "b": ONE(4, 513)}, ValueError, "a must be (R, K) with 1 <= R <= 512, got (513, 8)"),
    ({"b": ONE(2, 4)}, ValueError, "b must be (N, R) = (4, 2), got (2, 4)"),
    ({"b": "b"}, TypeError, "b must be a Tensor, got str"),
    ({"bias": ONE(5)}, ValueError, "bias must be (N,) = (4,), got (5,)"),
    ({"bias": 0}, TypeError, "bias must be a Tensor, got int"),
    ({"a": ONE(2, 8, device="meta")}, ValueError, "a must be on the device of x, cpu, got meta"),
    (
        {"x": ONE(3, 8, dtype=torch.int64)},
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    ({"w": ONE(4, 8).half()}, TypeError, "w must have the dtype of x, torch.float32, got torch.float16; "),
    ({"bias": ONE(4).half()}, TypeError, "bias must have the dtype of x, torch.float32, got torch.float16"),
    (
        {"a": ONE(2, 8).half()},
        TypeError,
        "a must have the dtype of x, torch.float32, or float32, got torch.float16",
    ),
    ({"b": ONE(4, 2).half()}, TypeError, "b must have the dtype of a, torch.float32, got torch.float16"),
    ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
    ({"scale": 10**400}, ValueError, "scale must be finite in float32, got 1000"),
    ({"scale": "2"}, TypeError, "scale must be a number, got str"),
    ({"scale": True}, TypeError, "scale must be a number, got bool"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1), got nan"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
    ({"impl": "cuda"}, ValueError, """impl must be "auto", "triton" or "reference", got 'cuda'"""),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"), CASES, ids=[message[:48] for _, _, message in CASES]
)
def test_a_bad_argument_is_named(changed, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match="^lora_linear: " + re.escape(message)):
        lora_linear(**arguments(**changed))
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_on_a_cpu_are_refused_unless_interpreted():
    kernels = pytest.importorskip("lowrank_ops.kernels")
    if kernels.INTERPRETED:
        assert lora_linear(**arguments(), impl="triton").shape == (3, 4)
    else:
        with pytest.raises(
            RuntimeError, match='^lora_linear: impl must be "auto" or "reference" for a tensor on cpu'
        ):
            lora_linear(**arguments(), impl="triton")


FAMILIES = ("lora_", "dense_lora_", "masked_lora_", "pruned_")


def test_every_launcher_has_a_namesake_with_its_arguments():
    kernels = pytest.importorskip("lowrank_ops.kernels")
    launchers = [name for name in kernels.__all__ if name.startswith(FAMILIES)]
    assert launchers == [name for name in reference.__all__ if name.startswith(FAMILIES)]
    for name in launchers:
        wanted = list(inspect.signature(getattr(reference, name)).parameters)
        found = inspect.signature(getattr(kernels, name)).parameters
        assert list(found)[: len(wanted)] == wanted
        # such as config: for tests and tuning
        assert all(
            found[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in list(found)[len(wanted) :]
        )
        assert list(inspect.signature(getattr(kernels.dispatch, name)).parameters) == wanted
