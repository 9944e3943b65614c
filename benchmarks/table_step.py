"""Results of training steps as Markdown."""

from collections.abc import Sequence

from .env import header
from .markdown import NONE, markdown, number

__all__ = ["compact", "render"]


def _cell(row: dict) -> tuple[str, str, str]:
    return row["shape"].replace("x", " × "), f"{row['dropout_p']}", f"{row['R']}"


def _short(row: dict | None, floor: str) -> str:
    if row is None or row["status"] == "skipped":
        return NONE
    if row["status"] != "ok" or row["step"] is None:
        return row["status"] if row["status"] != "ok" else NONE
    memory = number(row["activations_gib"])
    if row["provider"] == floor:
        return f"{number(row['step']['ms'], 1)} ms, {memory}"
    ratio = number(row["step"]["ratio"])
    if row["compiled"]:
        ratio += f" ({number(row['step']['ratio_compiled'])})"
    return f"{ratio}, {memory}"


def compact(rows: list[dict], providers: Sequence[str], floor: str) -> str:
    """Render a line for each cell and a column for each provider.

    The floor's column is in ms, every other its ratio to the floor, of compiled ones that to the compiled
    floor too, in brackets; after the comma GiB of activations.
    """
    found = {row["provider"] for row in rows}
    names = [name for name in providers if name in found]
    by_cell: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_cell.setdefault(_cell(row), {})[row["provider"]] = row
    body = [[*cell, *(_short(mine.get(name), floor) for name in names)] for cell, mine in by_cell.items()]
    return markdown(["sequences × tokens", "dropout", "r", *names], body)


def _detail(row: dict) -> list[str]:
    line = [*_cell(row), row["provider"]]
    if row["status"] != "ok":
        return [*line, f"{row['status']}: {row['reason']}", *[""] * 11]
    step, errors = row["step"] or {}, [ratio for ratio in row["gate"].values() if ratio is not None]
    return [
        *line,
        number(step.get("ms"), 3),
        f"{number(step.get('q1'), 3)} to {number(step.get('q3'), 3)}",
        number((row["fwd"] or {}).get("ms"), 3),
        number((row["bwd"] or {}).get("ms"), 3),
        number(step.get("ratio"), 3),
        number(step.get("ratio_compiled"), 3),
        number(row["activations_gib"], 3),
        number(row["peak_gib"], 3),
        number(row["host_ms"], 2),
        number(row["first_s"], 1) if row["compiled"] else NONE,
        number(max(errors, default=None)),
        row["note"] or "",
    ]


def _details(rows: list[dict]) -> str:
    head = ["sequences × tokens", "dropout", "r", "provider", "step ms", "quartiles", "fwd ms", "bwd ms"]
    head += ["× frozen", "× frozen compiled", "activations GiB", "peak GiB", "host ms", "compiling s"]
    head += ["worst error ×", "note"]
    return markdown(head, [_detail(row) for row in rows])


def render(data: dict) -> str:
    """Return the whole results file as Markdown: environment, ratios, every measured column."""
    rows = data["rows"]
    parts = [f"# {data['case']}", header(data["environment"])]
    if rows:
        parts += [
            f"One training step, forward and backward, {rows[0]['dtype']}, host time included. "
            f"`{data['floor']}` in ms, the others as a ratio to it in the same rounds; in brackets the ratio "
            "of compiled to frozen compiled; after the comma GiB of activations.",
            compact(rows, data["providers"], data["floor"]),
            f"## Everything measured\n\n{_details(rows)}",
        ]
    if not data["complete"]:
        parts.append("Incomplete: the run was stopped, or its budget was spent, before the last provider.")
    return "\n\n".join(parts) + "\n"
