"""Gluon's names for what the Hopper kernels use, where Triton releases differ."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "boxes_from",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "reinterpret",
    "thread_barrier",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

# renamed in Triton 3.9
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
)
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def boxes_from(bufs, first: gl.constexpr, count: gl.constexpr):
        """Shared memory of ``count`` boxes from the first on, to be reinterpreted."""
        return bufs.slice(first, count)

else:
    # older releases take no slice here, and do not mind a view that is larger than its box
    @gluon.jit
    def boxes_from(bufs, first: gl.constexpr, count: gl.constexpr):
        return bufs.index(first)
