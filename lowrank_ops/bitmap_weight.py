"""A pruned weight kept as a bitmap and its values: half of the entries at little over half of the bytes."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .adapter_tensors import write_files
from .functional import _DTYPES, _pick_impl
from .ops._library import run_here
from .ops.pruned import SparseCopy

__all__ = ["STRUCTURES", "BitmapWeight"]

STRUCTURES = ("unstructured", "2:4")
_FIELDS = {
    "unstructured": ("values", "mask", "row_offset", "tile_start"),
    "2:4": ("values", "index"),
}
_OP = "BitmapWeight"


class BitmapWeight:
    """A frozen (N, K) weight of which only the entries that are not zero are stored.

    Made by :meth:`from_dense`; read by :func:`lowrank_ops.pruned_linear` without being made dense first, and
    by :meth:`to_dense`. An entry is stored where its value is not equal to zero: NaN and infinities are,
    -0.0 is not and comes back as 0.0. Everything else comes back bit for bit.

    "unstructured": tiles of 64 rows by 64 columns; 64 bits say which columns of a row of a tile are there,
    least significant first, 16 bits where its values start: 16 · (1 - sparsity) + 1.26 bits per weight in
    16-bit dtypes, 9.26 at 50%. "2:4": of every four columns of a row at most two are there; two values and
    four bits for each four: 9 bits per weight.

    Source: the format is the package's own; the idea is that of SALR (arXiv:2601.16991).
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], structure: str = "unstructured"
    ) -> None:
        """Adopt ``tensors``, as :attr:`tensors` gave them, for a weight of this shape and structure.

        Raises:
            ValueError: a tensor is missing, too many or of another size. TypeError: of another dtype.
        """
        _check_structure(_OP, structure)
        N, K = shape
        _check_parts(tensors, N, K, structure)
        self.shape = torch.Size((N, K))
        self.structure = structure
        self._packed = [tensors[name] for name in _FIELDS[structure]]
        self._sparse: SparseCopy | None = None

    @classmethod
    def from_dense(cls, w: Tensor, structure: str = "unstructured") -> "BitmapWeight":
        """Encode ``w``, (N, K), in its dtype and on its device.

        Args:
            w: any floating dtype that ``pruned_linear`` takes; zeros are what is pruned.
            structure: "unstructured", or "2:4" for a weight without more than two entries that are not zero
                in any four columns 4 i .. 4 i + 3 of a row.

        Raises:
            ValueError: not 2-D, on the meta device, or not 2:4. TypeError: not a floating Tensor.

        Memory: on a GPU the result and little else; on a CPU some 20 bytes a weight on top.
        """
        op = "BitmapWeight.from_dense"
        if not isinstance(w, Tensor):
            raise TypeError(f"{op}: w must be a Tensor, got {type(w).__name__}")
        if w.dim() != 2:
            raise ValueError(f"{op}: w must be (N, K), got {tuple(w.shape)}")
        if w.dtype not in _DTYPES:
            raise TypeError(f"{op}: w must be float16, bfloat16, float32 or float64, got {w.dtype}")
        if w.is_meta:
            raise ValueError(f"{op}: w must hold values, got a tensor on the meta device")
        _check_structure(op, structure)
        w = w.detach()
        if structure == "2:4":
            lost = torch.zeros((), dtype=torch.int64, device=w.device)
            packed = run_here(_implementation(op, w).two_four_encode, w, lost)
            if int(lost):
                raise _not_two_four(op, w)
        else:
            packed = run_here(_implementation(op, w).bitmap_encode, w)
        return cls(dict(zip(_FIELDS[structure], packed, strict=True)), tuple(w.shape), structure)

    def to_dense(self) -> Tensor:
        """Return the weight, (N, K), as a new tensor."""
        decode = _implementation("BitmapWeight.to_dense", self.values).pruned_decode
        return run_here(lambda _, *rest: decode(*rest), self.values, self._packed, *self.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name, as :meth:`__init__` takes it: what a state dict should hold."""
        return dict(zip(_FIELDS[self.structure], self._packed, strict=True))

    @property
    def packed(self) -> list[Tensor]:
        """The tensors in the order in which the operations take them."""
        return list(self._packed)

    @property
    def values(self) -> Tensor:
        """The stored entries: (nnz,), or (N, K' / 2) for 2:4 with K' = K rounded up to 16."""
        return self._packed[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""
        return self._packed[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._packed[0].device

    def accelerate(self, tokens: int = 8192) -> "BitmapWeight":
        """Keep a copy for the GPU's sparse tensor cores too, and return the weight itself.

        ``pruned_linear`` with ``impl="auto"`` then takes it forward for ``tokens`` rows of x and more,
        outside of ``torch.compile``: PyTorch's semi-structured product, by cuSPARSELt, whose interface
        PyTorch calls a prototype. Its algorithm is the one that is fastest for so many rows, found by trying,
        once, in about a second. Backward, and fewer rows, go on as before. The copy is not saved, and does
        not follow :meth:`to` to another device, nor a copy of the layer that holds the weight.

        Args:
            tokens: rows of x, 1 or more.

        Raises:
            ValueError: not 2:4, not on a CUDA device, N or K no multiple of 32 or 64, or no such ``tokens``.
            TypeError: not float16 or bfloat16. RuntimeError: PyTorch has no cuSPARSELt here.

        Memory: 9 bits a weight on top, counted by :attr:`nbytes`; for the time of the call the dense weight,
        and x and y of that many rows.
        """
        op = "BitmapWeight.accelerate"
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"{op}: tokens must be an int of 1 or more, got {tokens!r}")
        if self._sparse is not None and self._sparse.tokens == tokens:
            return self
        if self.structure != "2:4":
            raise ValueError(f'{op}: structure must be "2:4", got {self.structure!r}')
        if self.device.type != "cuda":
            raise ValueError(f"{op}: device must be CUDA, got {self.device}")
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"{op}: dtype must be float16 or bfloat16, got {self.dtype}")
        N, K = self.shape
        if not N or not K or N % 32 or K % 64:
            raise ValueError(f"{op}: shape must be multiples of 32 and 64, got ({N}, {K})")
        if not torch.backends.cusparselt.is_available():
            raise RuntimeError(f"{op}: PyTorch must have cuSPARSELt, got a build or GPU without it")
        with torch.no_grad(), torch.cuda.device(self.device):
            weight = torch._cslt_compress(self.to_dense())
            x = torch.empty(tokens + -tokens % 8, K, dtype=self.dtype, device=self.device)
            x.normal_(generator=torch.Generator(self.device).manual_seed(0))
            # without split sums: of those the order is not known to be fixed
            algorithm, *_ = torch._C._cusparselt.mm_search(weight, x.T, None, None, None, True)
        self._sparse = SparseCopy(weight, tokens, algorithm)
        return self

    @property
    def accelerated(self) -> SparseCopy | None:
        """What :meth:`accelerate` keeps, or None."""
        return self._sparse

    @property
    def nnz(self) -> int:
        """How many entries are not zero; for 2:4 they are counted, which waits for the GPU."""
        return self.values.numel() if self.structure == "unstructured" else int(self.values.count_nonzero())

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, with what :meth:`accelerate` keeps."""
        return sum(t.nbytes for t in self._packed) + (self._sparse.weight.nbytes if self._sparse else 0)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each of the N · K weights, zeros included; 0 for an empty weight."""
        return 8 * self.nbytes / self.shape.numel() if self.shape.numel() else 0.0

    def to(self, device: torch.device | str) -> "BitmapWeight":
        """Return the weight on ``device``; itself if it is there."""
        moved = {name: t.to(device) for name, t in self.tensors.items()}
        if all(t is moved[name] for name, t in self.tensors.items()):
            return self
        return BitmapWeight(moved, tuple(self.shape), self.structure)

    def save(self, path: str | PathLike) -> None:
        """Write the weight to one safetensors file, under a temporary name first."""
        from safetensors.torch import save

        path = Path(path)
        N, K = self.shape
        metadata = {"format": "bitmap", "structure": self.structure, "N": str(N), "K": str(K)}
        contents = {name: t.contiguous() for name, t in self.tensors.items()}
        write_files("BitmapWeight.save", path.parent, {path.name: save(contents, metadata)})

    @classmethod
    def load(cls, path: str | PathLike, device: torch.device | str = "cpu") -> "BitmapWeight":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else. OSError: it can't be read.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "bitmap":
                raise ValueError(f"BitmapWeight.load: path must be a bitmap weight's file, got {str(path)!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(tensors, (int(metadata["N"]), int(metadata["K"])), metadata["structure"])

    def __repr__(self) -> str:
        return (
            f"BitmapWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"structure={self.structure!r}, bits_per_weight={self.bits_per_weight:.2f})"
        )


def _implementation(op: str, t: Tensor) -> object:
    _, module = _pick_impl(op, "auto", t)
    return module or reference


def _check_structure(op: str, structure: object) -> None:
    if structure not in STRUCTURES:
        raise ValueError(f'{op}: structure must be "unstructured" or "2:4", got {structure!r}')


def _not_two_four(op: str, w: Tensor) -> ValueError:
    present = torch.nn.functional.pad(w != 0, (0, -w.shape[1] % 4))
    present = present.view(w.shape[0], present.shape[1] // 4, 4)
    most = int(present.sum(-1).max())
    return ValueError(
        f"{op}: w must have at most 2 entries that are not zero in any 4 columns of a row, got {most}"
    )


def _check_parts(tensors: Mapping[str, Tensor], N: int, K: int, structure: str) -> None:
    """Raise unless ``tensors`` are what an encoder makes of an (N, K); their contents are believed."""
    if set(tensors) != set(_FIELDS[structure]):
        raise ValueError(
            f"{_OP}: tensors must be {', '.join(_FIELDS[structure])}, got {', '.join(sorted(tensors))}"
        )
    values = tensors["values"]
    tiles_n, tiles_k, groups = -(-N // reference.TILE), -(-K // reference.TILE), -(-K // 16)
    wanted = {
        "values": (N, 8 * groups) if structure == "2:4" else (values.numel(),),
        "mask": (tiles_n, tiles_k, reference.TILE, 2),
        "row_offset": (tiles_n, tiles_k, reference.TILE),
        "tile_start": (tiles_n * tiles_k + 1,),
        "index": (N, groups),
    }
    dtypes = {
        "values": _DTYPES,
        "mask": (torch.int32,),
        "row_offset": (torch.int16,),
        "tile_start": (torch.int32, torch.int64),
        "index": (torch.int16,),
    }
    for name, t in tensors.items():
        if t.dtype not in dtypes[name]:
            allowed = " or ".join(str(dtype) for dtype in dtypes[name])
            raise TypeError(f"{_OP}: {name} must be {allowed}, got {t.dtype}")
        if tuple(t.shape) != wanted[name]:
            raise ValueError(f"{_OP}: {name} must be {wanted[name]} for ({N}, {K}), got {tuple(t.shape)}")
        if t.device != values.device:
            raise ValueError(
                f"{_OP}: {name} must be on the device of values, {values.device}, got {t.device}"
            )
        if not t.is_contiguous():
            raise ValueError(f"{_OP}: {name} must be contiguous, got strides {t.stride()}")
