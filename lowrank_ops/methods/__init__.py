"""The methods, one file each: every ``Adapter`` defined in this folder is found here by its name."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from .base import Adapter, Factors

__all__ = ["METHODS", "Adapter", "Factors"]


def _find() -> Mapping[str, type[Adapter]]:
    found = {}
    for stem in sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base"):
        module = importlib.import_module(f"{__name__}.{stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == module.__name__:
                found[value.name] = value
    return MappingProxyType(found)


METHODS = _find()
