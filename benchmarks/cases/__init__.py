"""The benchmark cases: every file here is one, found by being here."""

from importlib import import_module
from pkgutil import iter_modules

from ..case import Case
from ..step_case import StepCase

__all__ = ["load", "names"]


def names() -> list[str]:
    """Return the names of all cases."""
    return sorted(module.name for module in iter_modules(__path__))


def load(name: str) -> Case | StepCase:
    """Return a case by name."""
    if name not in names():
        raise ValueError(f"benchmarks: case must be one of {', '.join(names())}, got {name}")
    return import_module(f"{__name__}.{name}").CASE
