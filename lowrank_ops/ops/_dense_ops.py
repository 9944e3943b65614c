"""Schemas and fakes of the DenseLoRA ops."""

__all__ = ["OPS"]

_OPTIONS = "float scale, bool gelu, Tensor? seed, float dropout_p"
_NEEDS = "bool need_x, bool need_encoder, bool need_core, bool need_decoder"


def _fake_forward(x, w, encoder, core, decoder, bias, scale, gelu, seed, dropout_p, impl):
    # the kernels multiply in the dtype of x
    u = (encoder if impl == "reference" else x).new_empty(x.shape[0], encoder.shape[0])
    return x.new_empty(x.shape[0], w.shape[0]), u, u.new_empty(u.shape), x.new_empty(0)


def _fake_backward(
    dy, x, w, encoder, core, decoder, u, h, mask, scale, gelu, seed, dropout_p,
    need_x, need_encoder, need_core, need_decoder, impl,
):  # fmt: skip
    return (
        dy.new_empty(dy.shape[0], w.shape[1]) if need_x else dy.new_empty(0),
        core.new_empty(core.shape[0], x.shape[1]) if need_encoder else dy.new_empty(0),
        core.new_empty(core.shape) if need_core else dy.new_empty(0),
        decoder.new_empty(decoder.shape) if need_decoder else dy.new_empty(0),
    )


OPS = {
    "dense_lora_forward": (
        "(Tensor x, Tensor w, Tensor encoder, Tensor core, Tensor decoder, Tensor? bias,"
        f" {_OPTIONS}, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_forward,
    ),
    "dense_lora_backward": (
        "(Tensor dy, Tensor? x, Tensor? w, Tensor? encoder, Tensor core, Tensor decoder, Tensor? u, Tensor h,"
        f" Tensor? mask, {_OPTIONS}, {_NEEDS}, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
}
