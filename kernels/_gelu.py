"""The exact GELU and its slope on tiles, and the dropout mask of single elements."""

import triton
import triton.language as tl

from ._tiles import keep_words


@triton.jit
def _tail(z):
    """(t P(t) / 2, exp(-z²/2)), whose product is Phi(-|z|) to within 8e-8 (Abramowitz, Stegun 7.1.26)."""
    # a reciprocal by way of its root: one instruction of the special unit on every GPU
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(z))
    t = root * root
    p = 0.5307027145 * t - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return p * t, tl.exp2(-0.72134752 * z * z)


@triton.jit
def _bell(z):
    """exp(-z²/2); in float32 with the errors of z² and of its multiple, which would be the slope's."""
    if z.dtype == tl.float32:
        square = z * z
        power = square * -0.72134751081466675
        rest = tl.fma(square, -0.72134751081466675, -power) - 9.6298151675e-09 * square
        rest += tl.fma(z, z, -square) * -0.72134751081466675
        out = tl.exp2(power)
        out += out * (rest * 0.6931471805599453)
    else:
        out = tl.exp(-0.5 * z * z)
    return out


@triton.jit
def gelu(z, FAST: tl.constexpr):
    """z Phi(z); FAST: to within 8e-8 |z|, where the result is rounded to 16 bits."""
    if FAST:
        p, e = _tail(z)
        out = tl.maximum(z, 0.0) - tl.abs(z) * (p * e)
    else:
        out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return out


@triton.jit
def gelu_slope(z, FAST: tl.constexpr):
    """Phi(z) + z phi(z), the derivative of gelu."""
    if FAST:
        p, e = _tail(z)
        # of -|z|; slopes of z and -z add up to 1
        low = (p - 0.39894228 * tl.abs(z)) * e
        out = tl.where(z >= 0, 1.0 - low, low)
    else:
        density = _bell(z) * 0.3989422804014327
        out = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    return out


@triton.jit
def keep_elements(seed, row, col, threshold):
    """The mask of reference.dropout_keep at any elements, each with a word of its own."""
    words = keep_words(seed, row, col // 32, threshold)
    return (words >> (col % 32).to(tl.uint32) & 1) != 0
