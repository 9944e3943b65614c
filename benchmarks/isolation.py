"""Failures of a provider are written down and the run goes on; a lost device ends the process."""

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["FAILURES", "DeviceLost", "free", "isolated"]


def _failures() -> tuple[type[BaseException], ...]:
    kinds = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    kinds += (subprocess.SubprocessError, TypeError, ValueError)
    try:
        from triton.errors import TritonError
    except ImportError:
        return kinds
    return (*kinds, TritonError)


# what a provider may raise and be written down for; anything else ends the run
FAILURES = _failures()


class DeviceLost(Exception):
    """The device answers no more after a failure: only a new process can go on. Holds the rows it cost."""

    def __init__(self, rows: list[dict]):
        super().__init__(rows[0]["reason"])
        self.rows, self.path = rows, None


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:240]}".rstrip(": ")


@contextmanager
def isolated(rows: list[dict], device: str, fatal: bool = True) -> Iterator[None]:
    """Write a failure into the rows, as their status if ``fatal`` and else as a note, and go on."""
    try:
        yield
        return
    except FAILURES as error:
        reason = _sentence(error)
    for row in rows:
        row.update({"status": "failed", "reason": reason} if fatal else {"note": reason})
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.ones(1, device=device).item()
        except RuntimeError as error:
            for row in rows:
                row.update(status="failed", reason=reason)
            raise DeviceLost(rows) from error


def free(device: str, keep_compiled: bool = False) -> None:
    """Give back what nobody holds any more, and what was compiled."""
    gc.collect()
    if not keep_compiled:
        torch.compiler.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
