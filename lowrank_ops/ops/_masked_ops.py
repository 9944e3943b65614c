"""Schemas and fakes of the ops with a masked b."""

__all__ = ["OPS"]

_OPTIONS = "float scale, Tensor? seed, float dropout_p"
_MASK = "Tensor values, Tensor words, Tensor offsets"
_TRAIN = "Tensor? train_words, Tensor? train_offsets, int train_count"


def _fake_forward(x, w, a, values, words, offsets, bias, scale, seed, dropout_p, impl):
    return x.new_empty(x.shape[0], w.shape[0]), a.new_empty(x.shape[0], a.shape[0]), x.new_empty(0)


def _fake_backward(
    dy, x, w, a, values, words, offsets, train_words, train_offsets, train_count, h, mask,
    scale, seed, dropout_p, need_x, need_a, need_b, impl,
):  # fmt: skip
    return (
        dy.new_empty(dy.shape[0], w.shape[1]) if need_x else dy.new_empty(0),
        a.new_empty(a.shape) if need_a else dy.new_empty(0),
        values.new_empty(values.shape) if need_b else dy.new_empty(0),
    )


OPS = {
    "masked_lora_forward": (
        f"(Tensor x, Tensor w, Tensor a, {_MASK}, Tensor? bias, {_OPTIONS}, str impl)"
        " -> (Tensor, Tensor, Tensor)",
        _fake_forward,
    ),
    "masked_lora_backward": (
        f"(Tensor dy, Tensor? x, Tensor? w, Tensor? a, {_MASK}, {_TRAIN}, Tensor? h, Tensor? mask,"
        f" {_OPTIONS}, bool need_x, bool need_a, bool need_b, str impl) -> (Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
}
