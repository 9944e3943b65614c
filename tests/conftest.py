"""Fixtures of every test, and which folders can run in this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton chooses between interpreter and compiler once, when it is imported: a process can do one of the two
LEFT_OUT = {
    HERE / "interpreter": None if INTERPRETED else "run it with TRITON_INTERPRET=1",
    HERE / "compile": "run it without TRITON_INTERPRET=1" if INTERPRETED else None,
}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if LEFT_OUT.get(collection_path) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for folder, advice in LEFT_OUT.items():
        if advice and folder.is_dir():
            terminalreporter.write_line(f"left out: tests/{folder.name}; {advice}, as make test does")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and not INTERPRETED:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and compiled kernels"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every buffer that PyTorch leaves uninitialised with NaN, so that reading one fails a test."""
    was_on, was_warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
