"""One cell from inputs to rows: gate, memory and host time, then all providers' times together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case, Cell, Provider
from .gate import Gate, verdict
from .isolation import DeviceLost, free, isolated
from .measure import host_microseconds, kept, launches, peak_mib
from .timing import Call, Eager, Graphs, calls_needed, copies_needed, interleave

__all__ = ["DeviceLost", "Machine", "count_launches", "measure_cell", "new_row"]

_SEED = 17


@dataclass(frozen=True)
class Machine:
    """What timing needs to know of the machine: measured ceilings, and the L2 cache in bytes."""

    copy_bytes_per_s: float
    flop_per_s: float
    l2_bytes: float

    def floor_seconds(self, case: Case, cell: Cell) -> dict[str, float]:
        """Return the least seconds of each pass at these ceilings."""
        work = case.work(cell)
        times = {
            key: max(least.bytes / self.copy_bytes_per_s, least.flops / self.flop_per_s)
            for key, least in work.items()
        }
        return times | {"both": sum(times.values())}


def new_row(cell: Cell, provider: str, status: str, reason: str | None = None) -> dict:
    """Return a row with every column, None where nothing was measured."""
    empty = ("fwd", "bwd", "both", "roofline", "launches")
    empty += ("kept_mib", "keeps_x", "peak_mib", "host_us", "note")
    return {
        **cell.as_row(),
        "provider": provider,
        "status": status,
        "reason": reason,
        "gate": {},
        **dict.fromkeys(empty),
    }


def _inputs(case: Case, cell: Cell, l2_bytes: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator(cell.device).manual_seed(_SEED)
    copies = [case.make_inputs(cell, generator)]
    size = sum(tensor.nbytes for tensor in copies[0].values())
    count = copies_needed(size, l2_bytes)
    return copies + [case.make_inputs(cell, generator) for _ in range(count - 1)]


def _calls(cell: Cell, provider: Provider, copies: Sequence[dict[str, Tensor]]) -> list[Call]:
    return [Call(provider.build(cell, t), None if cell.forward_only else t["dy"]) for t in copies]


def _judge(gate: Gate, provider: Provider, row: dict, floor: str) -> None:
    # the floor computes something else, and is stock PyTorch itself
    if provider.judged and provider.name != floor:
        row.update(verdict(gate.judge(provider)))


def _measure_memory(call: Call, tensors: dict[str, Tensor], row: dict, device: str) -> None:
    if call.dy is not None:
        known = [tensors["x"], *tensors.values(), *call.layer.leaves.values()]
        row["kept_mib"], row["keeps_x"] = kept(call, known)
    if device == "cuda":
        row["peak_mib"] = peak_mib(call)
    row["host_us"] = host_microseconds(call, device)


def _time(
    case: Case,
    cell: Cell,
    calls: dict[str, list[Call]],
    rows: dict[str, dict],
    machine: Machine,
    seconds: float,
) -> None:
    floors = machine.floor_seconds(case, cell)
    runs: dict[str, Eager | Graphs] = {}
    pool = torch.cuda.graph_pool_handle() if cell.device == "cuda" else None
    for name, unique in calls.items():
        with isolated([rows[name]], cell.device):
            if cell.device == "cuda":
                repeats = calls_needed(len(unique), floors["fwd"]) // len(unique)
                runs[name] = Graphs(unique * repeats, pool)
            else:
                runs[name] = Eager(unique)
    timings = interleave(runs, cell.device, seconds) if runs else {}
    floor = timings.get(case.floor)
    for name, timing in timings.items():
        for key, values in timing.items():
            rows[name][key] = values.columns(floor[key] if floor and key in floor else None)
        rows[name]["roofline"] = {key: floors[key] / (rows[name][key]["ms"] / 1e3) for key in timing}


def _measure(
    case: Case,
    cell: Cell,
    providers: Sequence[Provider],
    rows: dict[str, dict],
    machine: Machine,
    seconds: float,
) -> None:
    copies = _inputs(case, cell, machine.l2_bytes)
    gate = Gate(case, cell, copies[0])
    calls: dict[str, list[Call]] = {}
    for provider in providers:
        row = rows[provider.name]
        with isolated([row], cell.device):
            _judge(gate, provider, row, case.floor)
            if row["status"] == "ok":
                calls[provider.name] = _calls(cell, provider, copies)
    del gate
    for name, unique in calls.items():
        with isolated([rows[name]], cell.device, fatal=False):
            _measure_memory(unique[0], copies[0], rows[name], cell.device)
    _time(case, cell, calls, rows, machine, seconds)


def measure_cell(
    case: Case, cell: Cell, providers: Sequence[Provider], machine: Machine, seconds: float
) -> list[dict]:
    """Gate, measure and time ``providers``, and return one row each.

    A provider that fails the gate is "wrong" and not timed; one that raises is "failed"; both leave the
    others be. Memory is given back before returning.

    Args:
        seconds: for the timed rounds; the rest takes what it takes.

    Raises:
        DeviceLost: a failure left the device unusable.
    """
    rows = {provider.name: new_row(cell, provider.name, "ok") for provider in providers}
    with isolated(list(rows.values()), cell.device):
        _measure(case, cell, providers, rows, machine, seconds)
    free(cell.device)
    return list(rows.values())


def _profile(case: Case, cell: Cell, rows: dict[str, dict]) -> dict[str, dict[str, int]]:
    tensors = case.make_inputs(cell, torch.Generator(cell.device).manual_seed(_SEED))
    calls: dict[str, Call] = {}
    for name, row in rows.items():
        with isolated([row], cell.device, fatal=False):
            call = _calls(cell, case.provider(name), [tensors])[0]
            call.backward(call.forward())
            calls[name] = call
    return launches(calls, cell.device)


def count_launches(case: Case, cell: Cell, rows: dict[str, dict]) -> None:
    """Fill in ``launches`` of the rows of a cell that were timed, from one profile of one eager call each.

    For the end of a run: once the profiler has run, launches cost more host time. Does nothing on a CPU.
    """
    wanted = {name: row for name, row in rows.items() if row["status"] == "ok" and row["launches"] is None}
    if not wanted or cell.device != "cuda":
        return
    with isolated(list(wanted.values()), cell.device, fatal=False):
        for name, count in _profile(case, cell, wanted).items():
            wanted[name]["launches"] = count
    free(cell.device)
