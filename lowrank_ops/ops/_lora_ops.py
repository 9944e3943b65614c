"""The LoRA ops as a compiler sees them: schema, and shapes and dtypes of what they return.

See ``_library`` for what all ops have in common.
"""

from collections.abc import Callable

__all__ = ["OPS"]

_DROPOUT = "Tensor? seed, float dropout_p, str impl"
_GROUP = "Tensor[] ws, Tensor[] a_list, Tensor[] b_list"
_SCHEMAS = {
    "lora_forward": f"(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, float scale, {_DROPOUT})"
    " -> (Tensor, Tensor, Tensor)",
    "lora_backward": "(Tensor dy, Tensor? x, Tensor? w, Tensor? a, Tensor? b, Tensor? h, Tensor? mask,"
    " float scale, Tensor? seed, float dropout_p, bool need_x, bool need_a, bool need_b, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    "lora_backward_hidden": "(Tensor dy, Tensor b, float scale, str impl) -> Tensor",
    "lora_backward_b": "(Tensor dy, Tensor h, str impl) -> Tensor",
    "lora_backward_hidden_b": "(Tensor dy, Tensor b, Tensor h, float scale, str impl) -> (Tensor, Tensor)",
    "lora_backward_a": f"(Tensor dh, Tensor x, {_DROPOUT}) -> Tensor",
    "lora_backward_input": f"(Tensor dy, Tensor w, Tensor dh, Tensor a, {_DROPOUT}) -> Tensor",
    "lora_group_forward": f"(Tensor x, {_GROUP}, Tensor?[] biases, float[] scales, {_DROPOUT})"
    " -> (Tensor[], Tensor, Tensor)",
    "lora_group_backward": f"(Tensor?[] dys, Tensor? x, {_GROUP}, Tensor? h, Tensor? mask, float[] scales,"
    " Tensor? seed, float dropout_p, bool need_x, bool[] need_a, bool[] need_b, str impl)"
    " -> (Tensor, Tensor[], Tensor[])",
}


def _fake_forward(x, w, a, b, bias, scale, seed, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0]), a.new_empty(x.shape[0], a.shape[0]), x.new_empty(0)


def _fake_backward(dy, x, w, a, b, h, mask, scale, seed, dropout_p, need_x, need_a, need_b, impl):
    dx = dy.new_empty(dy.shape[0], w.shape[1]) if need_x else dy.new_empty(0)
    da = b.new_empty(b.shape[1], x.shape[1]) if need_a else dy.new_empty(0)
    return dx, da, h.new_empty(dy.shape[1], h.shape[1]) if need_b else dy.new_empty(0)


def _fake_hidden(dy, b, scale, impl):
    return b.new_empty(dy.shape[0], b.shape[1])


def _fake_b(dy, h, impl):
    return h.new_empty(dy.shape[1], h.shape[1])


def _fake_hidden_b(dy, b, h, scale, impl):
    return _fake_hidden(dy, b, scale, impl), _fake_b(dy, h, impl)


def _fake_a(dh, x, seed, dropout_p, impl):
    return dh.new_empty(dh.shape[1], x.shape[1])


def _fake_input(dy, w, dh, a, seed, dropout_p, impl):
    return dy.new_empty(dy.shape[0], w.shape[1])


def _fake_group_forward(x, ws, a_list, b_list, biases, scales, seed, dropout_p, impl):
    h = a_list[0].new_empty(x.shape[0], sum(a.shape[0] for a in a_list))
    return [x.new_empty(x.shape[0], w.shape[0]) for w in ws], h, x.new_empty(0)


def _fake_group_backward(
    dys, x, ws, a_list, b_list, h, mask, scales, seed, dropout_p, need_x, need_a, need_b, impl
):
    first = next(dy for dy in dys if dy is not None)
    empty = lambda: first.new_empty(0)  # noqa: E731
    dx = first.new_empty(first.shape[0], ws[0].shape[1]) if need_x else empty()
    das = [
        b.new_empty(b.shape[1], x.shape[1]) if need else empty()
        for b, need in zip(b_list, need_a, strict=True)
    ]
    return (
        dx,
        das,
        [b.new_empty(b.shape) if need else empty() for b, need in zip(b_list, need_b, strict=True)],
    )


_FAKES = {
    "lora_forward": _fake_forward,
    "lora_backward": _fake_backward,
    "lora_backward_hidden": _fake_hidden,
    "lora_backward_b": _fake_b,
    "lora_backward_hidden_b": _fake_hidden_b,
    "lora_backward_a": _fake_a,
    "lora_backward_input": _fake_input,
    "lora_group_forward": _fake_group_forward,
    "lora_group_backward": _fake_group_backward,
}

OPS: dict[str, tuple[str, Callable[..., object]]] = {
    name: (schema, _FAKES[name]) for name, schema in _SCHEMAS.items()
}
