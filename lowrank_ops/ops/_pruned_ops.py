"""Schemas and fakes of the ops on a compressed weight, which comes as the list of its tensors."""

__all__ = ["OPS"]


def _fake_matmul(x, packed, N, a, b, bias, scale, impl):
    h = x.new_empty(0) if a is None else a.new_empty(x.shape[0], a.shape[0])
    return x.new_empty(x.shape[0], N), h


def _fake_backward(dy, x, packed, K, a, b, h, scale, need_x, need_a, need_b, impl):
    dx = dy.new_empty(dy.shape[0], K) if need_x else dy.new_empty(0)
    da = b.new_empty(b.shape[1], K) if need_a else dy.new_empty(0)
    return dx, da, h.new_empty(dy.shape[1], h.shape[1]) if need_b else dy.new_empty(0)


OPS = {
    "pruned_matmul": (
        "(Tensor x, Tensor[] packed, SymInt N, Tensor? a, Tensor? b, Tensor? bias, float scale, str impl)"
        " -> (Tensor, Tensor)",
        _fake_matmul,
    ),
    "pruned_backward": (
        "(Tensor dy, Tensor? x, Tensor[] packed, SymInt K, Tensor? a, Tensor? b, Tensor? h, float scale,"
        " bool need_x, bool need_a, bool need_b, str impl) -> (Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
}
