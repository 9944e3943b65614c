"""``python -m benchmarks.bitmap_encoder``: a half pruned weight to its two encodings and back, in GB/s.

Wall clock from an idle device to an idle one, so with everything the host does and the one wait of the
encoder; medians over rounds in which all calls take turns, on copies that are larger together than the
cache. Bytes are those that must move: w once for encoding 2:4, twice for the bitmap, whose values are placed
only when all are counted; what is stored, once, and the bitmap's index once more.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_ops import BitmapWeight

from .env import environment, header, slug
from .results import write_atomic
from .timing import synchronize

__all__ = ["bytes_moved", "main", "measure"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_WARMUP = 3


def half_pruned(N: int, K: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Return a normal (N, K) with two random zeros in every four columns; K a multiple of 4."""
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.randn(N, K, generator=generator, device=device, dtype=dtype)
    order = torch.rand(N, K // 4, 4, generator=generator, device=device).argsort(-1)
    return w.view(N, K // 4, 4).scatter_(-1, order[..., :2], 0).view(N, K)


def bytes_moved(w: Tensor, packed: BitmapWeight) -> dict[str, int]:
    """Return the least bytes of memory traffic of encoding ``w`` and of decoding it."""
    if packed.structure == "2:4":
        return {"encode": w.nbytes + packed.nbytes, "decode": w.nbytes + packed.nbytes}
    index = packed.nbytes - packed.values.nbytes
    return {"encode": 2 * w.nbytes + packed.nbytes + index, "decode": w.nbytes + packed.nbytes}


def measure(
    N: int, K: int, dtype: torch.dtype, device: str, rounds: int, copies: int
) -> list[dict[str, object]]:
    """Return a row for encoding and decoding of each structure."""
    ws = [half_pruned(N, K, dtype, device, seed) for seed in range(copies)]
    calls, moved = {}, {}
    for structure in ("unstructured", "2:4"):
        packed = [BitmapWeight.from_dense(w, structure) for w in ws]
        for w, its in zip(ws, packed, strict=True):
            if not torch.equal(its.to_dense(), w):
                raise RuntimeError(f"bitmap_encoder: {structure} must come back the same, got other numbers")
        for name, count in bytes_moved(ws[0], packed[0]).items():
            moved[structure, name] = count
        calls[structure, "encode"] = lambda i, s=structure: BitmapWeight.from_dense(ws[i % copies], s)
        calls[structure, "decode"] = lambda i, p=packed: p[i % copies].to_dense()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in tqdm(range(rounds + _WARMUP), unit="round"):
        for key, call in calls.items():
            synchronize(device)
            begin = time.perf_counter()
            result = call(turn)
            synchronize(device)
            if turn >= _WARMUP:
                seconds[key].append(time.perf_counter() - begin)
            del result
    return [_row(*key, moved[key], statistics.median(taken)) for key, taken in seconds.items()]


def _row(structure: str, direction: str, count: int, seconds: float) -> dict[str, object]:
    speed = count / seconds / 1e9
    return {"structure": structure, "call": direction, "bytes": count, "ms": 1e3 * seconds, "gb_per_s": speed}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bitmap_encoder", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--shape", type=int, nargs=2, default=(14336, 4096), metavar=("N", "K"))
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--copies", type=int, default=4, help="weights that take turns")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="commit to record where the sources lie outside git")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device, args.commit)
    print(header(found))
    rows = measure(*args.shape, _DTYPES[args.dtype], device, args.rounds, args.copies)
    for row in rows:
        print("{structure:13} {call}  {ms:.3f} ms  {gb_per_s:.0f} GB/s".format(**row))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"bitmap_encoder-{slug(found)}-{found['date']}.json"
    settings = {"shape": list(args.shape), "dtype": args.dtype, "rounds": args.rounds, "copies": args.copies}
    write_atomic(path, json.dumps({"environment": found, **settings, "rows": rows}, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
