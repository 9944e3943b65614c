"""The environment a result was measured in. Everything is queried and nothing is set."""

import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["environment", "header", "slug"]

_ROOT = Path(__file__).resolve().parent.parent
_SMI_FIELDS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, object]:
    facts = torch.cuda.get_device_properties(0)
    smi = _output("nvidia-smi", "--id=0", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader")
    values = smi.splitlines()[0].split(", ") if smi else []
    return {
        "gpu": facts.name,
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "l2_mib": getattr(facts, "L2_cache_size", 0) / 2**20,
        "cuda": torch.version.cuda or torch.version.hip,
        **dict(zip(_SMI_FIELDS.replace(".", "_").split(","), values, strict=False)),
    }


def environment(device: str, commit: str | None = None) -> dict[str, object]:
    """Return hardware, software versions and commit; None for what could not be found out.

    Args:
        device: "cuda" or "cpu".
        commit: for a copy of the sources, the commit they were taken from; None asks git.
    """
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": date.today().isoformat(),
        "device": device,
        **(_gpu() if device == "cuda" else {"gpu": None, "threads": torch.get_num_threads()}),
        "python": platform.python_version(),
        # with its build, which the package's metadata may leave out
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "peft", "transformers")},
        # a copy may lie inside another checkout, of which git would tell
        "commit": commit or _output("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": None if commit or status is None else bool(status),
    }


def slug(environment: dict[str, object]) -> str:
    """Return the GPU's name as a part of a file name, such as ``h100-80gb-hbm3``; ``cpu`` without one."""
    name = environment["gpu"] or "cpu"
    return "-".join(str(name).lower().replace("nvidia", "").split())


def header(environment: dict[str, object]) -> str:
    """Return the environment in one line."""
    commit = environment["commit"] or "unknown commit"
    if environment["dirty"]:
        commit += " with uncommitted changes"
    parts = [environment["gpu"] or f"CPU, {environment.get('threads')} threads"]
    if environment.get("driver_version"):
        parts.append(f"driver {environment['driver_version']}, SM clock {environment['clocks_sm']} at start")
    for package in ("torch", "triton", "peft"):
        parts.append(f"{package} {environment[package] or 'not installed'}")
    return ", ".join([*map(str, parts), f"Python {environment['python']}", commit, str(environment["date"])])
