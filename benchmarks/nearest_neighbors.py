"""``python -m benchmarks.nearest_neighbors``: two nearest neighbours of each point, against cdist and topk.

Points are Gaussian, which have nearly equal distances and so are the hardest to tell apart, or lie on a
manifold of ten dimensions with near-duplicates far from the origin, the hardest to measure. Errors are
against float64 differences, over a sample of rows.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_ops.functional import nearest_neighbors

from .case import dtype_name
from .env import environment, header, slug
from .results import write_atomic
from .timing import time_call

__all__ = ["main", "measure"]

_SAMPLE = 256  # rows that errors are measured on


def gaussian(M: int, K: int, generator: torch.Generator) -> Tensor:
    """Return M standard normal points."""
    return torch.randn(M, K, generator=generator, device=generator.device)


def manifold(M: int, K: int, generator: torch.Generator) -> Tensor:
    """Return points of a cube of 10 dimensions, a tenth of them close to another, 10 from the origin."""
    basis = torch.randn(10, K, generator=generator, device=generator.device)
    points = torch.rand(M, 10, generator=generator, device=generator.device) @ basis
    close = M // 10
    points[:close] = points[-close:] + 1e-4 * torch.randn(close, K, generator=generator, device=points.device)
    return points + 10


def cdist_topk(points: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in stock PyTorch, in float32: all distances, then the three smallest of each row."""
    points = points.float()
    _, first, second = torch.cdist(points, points).topk(3, largest=False).values.unbind(1)
    return first, second


def errors(points: Tensor, found: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the largest relative error of both distances over a sample of rows, against float64."""
    rows = torch.linspace(0, len(points) - 1, min(_SAMPLE, len(points)), device=points.device).long()
    exact = points.double()
    worst = {"first": 0.0, "second": 0.0}
    for row in rows.split(8):
        distances = torch.cdist(exact[row], exact, compute_mode="donot_use_mm_for_euclid_dist")
        truth = distances.topk(3, largest=False).values[:, 1:].unbind(1)
        for name, got, true in zip(worst, found, truth, strict=True):
            worst[name] = max(
                worst[name], ((got[row].double() - true).abs() / true.clamp_min(1e-30)).max().item()
            )
    return worst


def peak_mib(function: Callable[[Tensor], object], points: Tensor) -> float | None:
    """Return the most MiB of GPU memory that a call holds above the points; None on a CPU."""
    if not points.is_cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(points)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(points: Tensor, repeats: int) -> dict[str, dict[str, object]]:
    """Return ms, peak MiB and largest relative errors of ours and of PyTorch, and the speedup."""
    rows: dict[str, dict[str, object]] = {}
    for name, function in {"ours": nearest_neighbors, "cdist_topk": cdist_topk}.items():
        found = function(points)
        seconds = time_call(lambda function=function: function(points), points.device.type, repeats)
        rows[name] = {
            "ms": 1e3 * seconds,
            "peak_mib": peak_mib(function, points),
            "error": errors(points, found),
        }
    again = nearest_neighbors(points)
    rows["ours"]["repeats"] = all(map(torch.equal, nearest_neighbors(points), again))
    rows["ours"]["speedup"] = rows["cdist_topk"]["ms"] / rows["ours"]["ms"]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line; the results file is rewritten after each measurement."""
    name = "benchmarks.nearest_neighbors"
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", help="commit to record where the sources lie outside git")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device, args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"nearest_neighbors-{slug(found)}-{found['date']}.json"
    data = {"environment": found, "points": args.points, "width": args.width, "rows": []}
    cells = [(make, dtype) for make in (gaussian, manifold) for dtype in (torch.float32, torch.bfloat16)]
    print(header(found))
    for make, dtype in tqdm(cells, unit="cell"):
        points = make(args.points, args.width, torch.Generator(device).manual_seed(0)).to(dtype)
        rows = measure(points, args.repeats)
        data["rows"].append({"data": make.__name__, "dtype": dtype_name(dtype), **rows})
        write_atomic(path, json.dumps(data, indent=1) + "\n")
        tqdm.write(f"{make.__name__} {dtype_name(dtype)}: {json.dumps(rows)}", file=sys.stdout)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
