"""A results file: rewritten whole after every cell, under a temporary name that is renamed."""

import json
import os
from pathlib import Path

from .case import Case, Cell
from .env import slug
from .step_case import StepCase, StepCell

__all__ = ["SCHEMA", "Results", "load", "write_atomic"]

SCHEMA = 1


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that whoever reads it sees the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read a results file.

    Raises:
        ValueError: not a results file, or one of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"benchmarks: {path} must be a results file, got invalid JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"benchmarks: {path} must have schema {SCHEMA}, got {schema}")
    return data


class Results:
    """Rows of one run and where they go; every ``add`` leaves a complete file."""

    def __init__(self, path: Path, data: dict):
        self.path, self.data = path, data

    @classmethod
    def create(cls, folder: Path, case: Case | StepCase, environment: dict, options: dict) -> "Results":
        """Start ``CASE-GPU-DATE.json`` in ``folder``, with a number added if that name is taken."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{case.name}-{slug(environment)}-{environment['date']}"
        path, number = folder / f"{stem}.json", 1
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.json"
        data = {
            "schema": SCHEMA,
            "case": case.name,
            "kind": case.kind,
            "floor": case.floor,
            "providers": [provider.name for provider in case.providers],
            "environment": environment,
            "options": options,
            "peaks": {},
            "complete": False,
            "rows": [],
        }
        results = cls(path, data)
        results.write()
        return results

    @classmethod
    def resume(cls, path: Path) -> "Results":
        """Go on with a file; rows that were skipped are forgotten, so that they are tried again."""
        data = load(path)
        data["rows"] = [row for row in data["rows"] if row["status"] != "skipped"]
        return cls(path, data)

    def add(self, rows: list[dict]) -> None:
        """Append rows and write."""
        self.data["rows"].extend(rows)
        self.write()

    def rows(self, cell: Cell | StepCell) -> dict[str, dict]:
        """Return the rows of a cell by provider."""
        wanted = cell.as_row().items()
        return {row["provider"]: row for row in self.data["rows"] if wanted <= row.items()}

    def write(self) -> None:
        """Write the file as it stands."""
        write_atomic(self.path, json.dumps(self.data, indent=1) + "\n")
