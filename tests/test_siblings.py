"""Which layers are called on one tensor, as read from the source of a forward pass."""

import pytest
import transformers.models.bart.modeling_bart as bart
import transformers.models.gemma.modeling_gemma as gemma
import transformers.models.llama.modeling_llama as llama
import transformers.models.mistral.modeling_mistral as mistral
import transformers.models.qwen2.modeling_qwen2 as qwen2
import transformers.models.qwen3.modeling_qwen3 as qwen3

from lowrank_ops.siblings import shared_inputs


@pytest.mark.parametrize("module", [llama, mistral, qwen2, qwen3, gemma], ids=lambda module: module.__name__)
def test_attention_and_mlp_of_llama_and_its_kin_share_their_inputs(module):
    found = {
        name: shared_inputs(value.forward)
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "forward")
    }
    (attention,) = (groups for name, groups in found.items() if name.endswith("Attention"))
    (mlp,) = (groups for name, groups in found.items() if name.endswith("MLP"))
    assert attention == (("q_proj", "k_proj", "v_proj"),)
    assert mlp == (("gate_proj", "up_proj"),)


def test_cross_attention_shares_what_comes_from_the_other_side_alone():
    assert shared_inputs(bart.BartAttention.forward) == (("k_proj", "v_proj"),)


def straight(self, x, y):
    first = self.a(x).view(-1)
    second = self.b(self.c(x)) + self.d(y)
    return first, second, self.e(y)


def nested(me, x):
    if x.ndim:
        return me.a(x) * me.b(x)
    with me.context(x) as other:
        return [me.c(other), me.d(other)]


def reassigned(self, x):
    first = self.a(x)
    x = self.norm(x)
    return first + self.b(x)


def widened(self, x):
    first = self.a(x)
    x += 1
    return first + self.b(x)


def filled(self, x):
    first = self.a(x)
    x[0] = 0
    return first + self.b(x)


def written(self, x):
    first = self.a(x)
    x.add_(1)
    return first + self.b(x)


def branching(self, x):
    first = self.a(x)
    if self.cross:
        x = self.norm(x)
    return first + self.b(x)


def returning(self, x):
    first = self.a(x)
    if self.short:
        return first
    return first + self.b(x)


def conditional(self, x):
    first = self.a(x)
    return first + (self.b(x) if self.wide else self.c(x)) + (self.wide and self.d(x))


def twice(self, x):
    return self.a(x) + self.b(x) + self.a(x)


def twice_apart(self, x):
    if self.wide:
        return self.a(x) + self.b(x)
    return self.a(x)


def with_options(self, x):
    return self.a(x, 1) + self.b(x, scale=2) + self.c(*x) + self.d(x[0]) + self.e(x.y)


def later(self, x):
    return self.a(x), lambda: self.b(x), [self.c(x) for _ in range(2)]


def of_another(self, other, x):
    return self.a(x), other.b(x), self.deep.c(x)


CASES = {
    straight: (("a", "c"), ("d", "e")),
    nested: (("a", "b"), ("c", "d")),
    reassigned: (("a", "norm"),),
    widened: (),
    filled: (),
    written: (),
    branching: (),
    returning: (),
    conditional: (),
    twice: (),
    twice_apart: (),
    with_options: (),
    later: (),
    of_another: (),
    len: (),
}


@pytest.mark.parametrize(("forward", "expected"), CASES.items(), ids=[forward.__name__ for forward in CASES])
def test_children_share_a_variable_only_if_nothing_comes_between(forward, expected):
    assert shared_inputs(forward) == expected


def test_without_a_source_nothing_is_known():
    scope = {}
    exec("def forward(self, x): return self.a(x) + self.b(x)", scope)
    assert shared_inputs(scope["forward"]) == ()
