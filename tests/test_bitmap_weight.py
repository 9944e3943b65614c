"""BitmapWeight: exact round trips, the layout that is promised, sizes, files and errors."""

import json

import pytest
import torch
from torch import Tensor

from benchmarks import bitmap_encoder
from lowrank_ops import BitmapWeight, reference

SHAPES = [(64, 128), (100, 37), (1, 1), (0, 5), (5, 0), (130, 200)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STRUCTURES = ["unstructured", "2:4"]


def pruned(N: int, K: int, structure: str = "unstructured", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers, half of them zero."""
    generator = torch.Generator().manual_seed(N + K)
    w = torch.randn(N, -(-K // 4) * 4, generator=generator)
    groups = w.view(N, w.shape[1] // 4, 4)
    if structure == "2:4":
        keep = groups.abs().argsort(-1).argsort(-1) >= 2
    else:
        keep = torch.rand(groups.shape, generator=generator) < 0.5
    return (groups * keep).view(w.shape)[:, :K].to(dtype).contiguous()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_is_exact(shape, dtype, structure):
    w = pruned(*shape, structure, dtype)
    packed = BitmapWeight.from_dense(w, structure=structure)
    assert torch.equal(packed.to_dense(), w)
    assert packed.shape == w.shape
    assert packed.dtype == dtype
    assert packed.nnz == w.count_nonzero()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_infinities_and_nan_are_kept_and_negative_zero_is_zero(structure):
    w = torch.tensor([[0.0, float("nan"), -0.0, float("-inf"), 1e-45, 0, 0, 0]])
    back = BitmapWeight.from_dense(w, structure).to_dense()
    torch.testing.assert_close(back, w, rtol=0, atol=0, equal_nan=True)
    assert not back[0, 2].signbit()


def test_a_strided_weight_is_encoded_as_it_reads():
    w = pruned(70, 90)
    assert torch.equal(BitmapWeight.from_dense(w.T).to_dense(), w.T)


def test_the_bits_of_a_row_come_least_significant_first():
    row = torch.tensor([[0, 5.0, 0, -1, 2, 0, 0, 3]])
    tensors = BitmapWeight.from_dense(row).tensors
    assert tensors["mask"].view(torch.uint8)[0, 0, 0, 0] == 0x9A
    assert tensors["values"].tolist() == [5, -1, 2, 3]


def test_values_lie_by_tiles_along_k_then_by_rows():
    w = pruned(65, 130)
    tensors = BitmapWeight.from_dense(w).tensors
    tiles = [w[n : n + 64, k : k + 64] for n in (0, 64) for k in (0, 64, 128)]
    assert torch.equal(tensors["values"], torch.cat([tile[tile != 0] for tile in tiles]))
    counts = [int(tile.count_nonzero()) for tile in tiles]
    assert tensors["tile_start"].diff().tolist() == counts
    starts = (tiles[1] != 0).sum(1).cumsum(0) - (tiles[1] != 0).sum(1)
    assert tensors["row_offset"][0, 1].tolist() == starts.tolist()


def test_two_of_four_are_two_values_and_two_columns():
    w = torch.tensor([[0, 5.0, 0, -1, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 7, 8]])
    tensors = BitmapWeight.from_dense(w, "2:4").tensors
    assert tensors["values"].tolist() == [[5, -1, 2, 0, 0, 3, 7, 8]]
    codes = [(1, 3), (0, 1), (0, 3), (2, 3)]
    expected = sum((first | second << 2) << 4 * i for i, (first, second) in enumerate(codes))
    assert tensors["index"].item() & 0xFFFF == expected


@pytest.mark.parametrize(("structure", "least", "most"), [("unstructured", 9.0, 9.3), ("2:4", 9.0, 9.0)])
def test_half_a_16_bit_weight_takes_9_bits(structure, least, most):
    packed = BitmapWeight.from_dense(pruned(512, 1024, structure, torch.bfloat16), structure)
    assert least <= packed.bits_per_weight <= most
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors.values())
    assert packed.bits_per_weight == 8 * packed.nbytes / (512 * 1024)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_gives_the_weight_back(tmp_path, structure):
    pytest.importorskip("safetensors")
    w = pruned(70, 90, structure, torch.bfloat16)
    path = tmp_path / "w.safetensors"
    BitmapWeight.from_dense(w, structure).save(path)
    back = BitmapWeight.load(path)
    assert torch.equal(back.to_dense(), w)
    assert back.structure == structure
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_another_file_is_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"values": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="^BitmapWeight.load: path must be a bitmap weight's file"):
        BitmapWeight.load(tmp_path / "other.safetensors")


def test_tensors_make_the_weight_again():
    w = pruned(70, 90)
    packed = BitmapWeight.from_dense(w)
    assert torch.equal(BitmapWeight(packed.tensors, (70, 90)).to_dense(), w)
    assert packed.to("cpu") is packed
    assert packed.to("meta").tensors["mask"].is_meta


def test_places_of_tiles_may_be_64_bit():
    packed = reference.bitmap_encode(pruned(4, 4))
    packed[3] = packed[3].long()
    fields = ("values", "mask", "row_offset", "tile_start")
    wide = BitmapWeight(dict(zip(fields, packed, strict=True)), (4, 4))
    assert torch.equal(wide.to_dense(), pruned(4, 4))


def parts(**changes: Tensor) -> dict[str, Tensor]:
    return BitmapWeight.from_dense(pruned(70, 90)).tensors | changes


def test_the_encoder_benchmark_counts_the_bytes_that_must_move(tmp_path):
    sizes = ["--shape", "64", "128", "--rounds", "1", "--copies", "1", "--dtype", "float32"]
    assert bitmap_encoder.main(["--device", "cpu", *sizes, "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("bitmap_encoder-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    dense, index = 64 * 128 * 4, 2 * 64 * 10 + 3 * 4
    assert [row["bytes"] for row in rows] == [
        2 * dense + dense // 2 + 2 * index,
        dense + dense // 2 + index,
        dense + dense // 2 + 64 * 128 // 8,
        dense + dense // 2 + 64 * 128 // 8,
    ]
    assert all(row["ms"] > 0 for row in rows)


ERRORS = {
    "w": (lambda: BitmapWeight.from_dense([1.0]), TypeError, "from_dense: w must be a Tensor, got list"),
    "3-D": (lambda: BitmapWeight.from_dense(torch.ones(2, 2, 2)), ValueError, r"w must be \(N, K\), got"),
    "int": (
        lambda: BitmapWeight.from_dense(torch.ones(2, 2).int()),
        TypeError,
        "w must be float16, bfloat16,",
    ),
    "meta": (
        lambda: BitmapWeight.from_dense(torch.ones(2, 2, device="meta")),
        ValueError,
        "w must hold values, got a tensor on the meta device",
    ),
    "structure": (
        lambda: BitmapWeight.from_dense(torch.ones(2, 2), "1:2"),
        ValueError,
        'structure must be "unstructured" or "2:4", got \'1:2\'',
    ),
    "three": (
        lambda: BitmapWeight.from_dense(torch.tensor([[1.0, 2, 3, 0, 0]]), "2:4"),
        ValueError,
        "w must have at most 2 entries that are not zero in any 4 columns of a row, got 3",
    ),
    "missing": (
        lambda: BitmapWeight({"values": torch.ones(3)}, (2, 2)),
        ValueError,
        "tensors must be values, m",
    ),
    "size": (
        lambda: BitmapWeight(parts(mask=torch.ones(1, 1, 64, 2).int()), (70, 90)),
        ValueError,
        r"mask must be \(2, 2, 64, 2\) for \(70, 90\), got \(1, 1, 64, 2\)",
    ),
    "dtype": (
        lambda: BitmapWeight(parts(row_offset=torch.zeros(2, 2, 64)), (70, 90)),
        TypeError,
        "row_offset must be torch.int16, got torch.float32",
    ),
    "device": (
        lambda: BitmapWeight(
            parts(row_offset=torch.zeros(2, 2, 64, dtype=torch.int16, device="meta")), (70, 90)
        ),
        ValueError,
        "row_offset must be on the device of values, cpu, got meta",
    ),
    "strides": (
        lambda: BitmapWeight(parts(mask=torch.ones(2, 2, 2, 64).int().mT), (70, 90)),
        ValueError,
        "mask must be contiguous, got strides",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match="^BitmapWeight.*" + message):
        call()
