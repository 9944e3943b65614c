"""The kernels on a compressed weight build for every supported GPU, and spill no register on any of them."""

import pytest
import torch
from ahead_of_time import TARGETS, Recorder, compile_launch, resources

pytest.importorskip("triton")

from lowrank_ops import kernels  # noqa: E402
from lowrank_ops.kernels import _few_hidden, bitmap_codec, pruned_few, pruned_stream  # noqa: E402
from lowrank_ops.kernels._config import DeviceFacts  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET is set: nothing is compiled")

JITS = [
    (pruned_few, "_pruned_vector_kernel"),
    (pruned_few, "_pruned_few_kernel"),
    (pruned_stream, "two_four_stream_kernel"),
    (pruned_stream, "bitmap_stream_kernel"),
    (_few_hidden, "_few_hidden_kernel"),
    (bitmap_codec, "_two_four_decode_kernel"),
    (bitmap_codec, "_two_four_kernel"),
    (bitmap_codec, "_bitmap_mask_kernel"),
    (bitmap_codec, "_bitmap_pack_kernel"),
    (bitmap_codec, "_bitmap_pack_shared_kernel"),
    (bitmap_codec, "_bitmap_decode_kernel"),
]
PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}
SHARED_MEMORY = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program may have
# what has other code on a target: structure, dtype, M; each beside an adapter of rank 128 and a bias
CASES = [
    ("sm80", "unstructured", torch.bfloat16, 64),
    ("sm90", "unstructured", torch.bfloat16, 1),
    ("sm90", "unstructured", torch.bfloat16, 64),
    ("sm90", "unstructured", torch.float32, 1),
    ("sm90", "2:4", torch.float16, 16),
    ("sm100", "unstructured", torch.bfloat16, 1),
    ("gfx942", "unstructured", torch.bfloat16, 64),
    ("gfx942", "2:4", torch.bfloat16, 1),
]


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def packed(N: int, K: int, structure: str, dtype: torch.dtype) -> list[torch.Tensor]:
    if structure == "2:4":
        return [empty(N, K // 2, dtype=dtype), empty(N, K // 16, dtype=torch.int16)]
    tiles = (N // 64, K // 64)
    return [
        empty(N * K // 2, dtype=dtype),
        empty(*tiles, 64, 2, dtype=torch.int32),
        empty(*tiles, 64, dtype=torch.int16),
        empty(tiles[0] * tiles[1] + 1, dtype=torch.int32),
    ]


@pytest.mark.parametrize(("target", "structure", "dtype", "M"), CASES, ids=str)
def test_every_launch_compiles_fits_and_spills_nothing(monkeypatch, target, structure, dtype, M):
    recorders = [Recorder(getattr(module, name)) for module, name in JITS]
    for (module, name), recorder in zip(JITS, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    for module in (pruned_few, pruned_stream, bitmap_codec):
        monkeypatch.setattr(
            module, "device_facts", lambda _: DeviceFacts(arch=target, processors=PROCESSORS[target])
        )
    N, K, R = 14336, 4096, 128
    w, x, h, b = (empty(*size, dtype=dtype) for size in ((N, K), (M, K), (M, R), (N, R)))
    parts = packed(N, K, structure, dtype)
    pruned_few.pruned_few(x, parts, N, h, b, b[:, 0])
    if structure == "unstructured" and target in ("sm80", "sm90") and dtype is torch.bfloat16:
        pruned_stream.pruned_stream(x, parts, N, None, None, None)
        if target == "sm90" and M <= 16:
            pruned_stream.adapted_stream(x, parts, N, empty(R, K, dtype=dtype), b, None, 1.0)
            many = empty(16, K, dtype=dtype), parts, N, empty(16, R, dtype=dtype), b, None
            pruned_stream.pruned_stream(*many)
            pruned_stream.pruned_stream(many[0], packed(4096, K, structure, dtype), 4096, *many[3:])
    if target in ("sm90", "gfx942") and M > 1:
        bitmap_codec.pruned_decode(parts, N, K)
    if target == "sm90" and structure == "2:4":
        bitmap_codec.two_four_encode(w, torch.empty((), dtype=torch.int64, device="meta"))
    if target in ("sm90", "gfx942") and M == 64:
        values, mask, offset, start = parts
        if target == "sm90":
            bitmap_codec.launch(bitmap_codec._prepare_mask, (w, mask, offset, start))
        bitmap_codec.launch(bitmap_codec._prepare_pack, (w, mask, offset, start, values))
    bad = {}
    for recorder in recorders:
        for args, kwargs in recorder.launches:
            found = resources(compile_launch(recorder.kernel, args, kwargs, TARGETS[target]))
            if found["spilled"] or found["shared"] > SHARED_MEMORY[target]:
                bad[f"{recorder.kernel.__name__} {kwargs}"] = found
    assert sum(len(recorder.launches) for recorder in recorders) >= 1
    assert not bad
