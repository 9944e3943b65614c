"""Training steps from inputs to rows: gate, memory, then all providers' times together.

Eager providers of all cells come first, the compiled ones after them, so that a budget cuts compiling.
The floors are timed again beside the compiled providers: every ratio is taken within the same rounds.
"""

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from .gate import Gate, verdict
from .isolation import DeviceLost, free, isolated
from .measure import kept, peak_mib
from .options import Options, chosen_shapes
from .results import Results
from .step_case import StepCase, StepCell, StepProvider
from .timing import Step, TrainingCall, interleave, synchronize

__all__ = ["measure_steps", "new_step_row", "step_cells"]

_SEED = 17
_COMPILE_SECONDS = 45.0  # what compiling is thought to take before the first has been seen
_MOST_COMPILED = 8  # variants of one function, after which torch.compile silently runs it eagerly
_TIMED_SHARE = 1 / 30  # of the budget, for the timed rounds of one group


def step_cells(case: StepCase, options: Options) -> list[StepCell]:
    """Return the cells in the order of their importance: by rank, then shape, then dropout."""
    tiny = options.quick and options.device == "cpu"
    return [
        StepCell(
            shape=shape,
            model=case.quick_model if tiny else case.model,
            batch=batch,
            length=length,
            R=R,
            dropout_p=dropout_p,
            dtype=options.dtype,
            device=options.device,
        )
        for R in options.ranks
        for shape, (batch, length) in chosen_shapes(case, options).items()
        for dropout_p in options.dropouts
    ]


def new_step_row(cell: StepCell, provider: StepProvider, status: str, reason: str | None = None) -> dict:
    """Return a row with every column, None where nothing was measured."""
    empty = ("fwd", "bwd", "step", "activations_gib", "peak_gib", "host_ms", "first_s", "note")
    return {
        **cell.as_row(),
        "provider": provider.name,
        "compiled": provider.compiled,
        "status": status,
        "reason": reason,
        "gate": {},
        **dict.fromkeys(empty),
    }


@dataclass(frozen=True, eq=False)
class _Group:
    """The providers of one cell that are timed in the same rounds; of ``floors`` no rows are wanted."""

    cell: StepCell
    floors: tuple[StepProvider, ...]
    providers: tuple[StepProvider, ...]


def _wanted(case: StepCase, cell: StepCell, options: Options) -> list[StepProvider]:
    if options.providers is None:
        return [provider for provider in case.providers if provider.by_default(cell)]
    names = {case.floor, *options.providers}
    if any(case.provider(name).compiled for name in names):
        names.add(case.compiled_floor)
    return [provider for provider in case.providers if provider.name in names]


def _groups(case: StepCase, options: Options, results: Results) -> list[_Group]:
    groups = []
    for compiled in (False, True):
        for cell in step_cells(case, options):
            wanted = [p for p in _wanted(case, cell, options) if p.compiled == compiled]
            done = results.rows(cell)
            todo = tuple(p for p in wanted if p.name not in done)
            names = [case.floor, case.compiled_floor] if compiled else [case.floor]
            floors = tuple(case.provider(name) for name in names if name not in {p.name for p in todo})
            if todo:
                groups.append(_Group(cell, floors, todo))
    return groups


def measure_steps(case: StepCase, options: Options, results: Results, deadline: float) -> None:
    """Measure all cells of a run, adding rows to ``results`` as they come.

    A provider that fails the gate is "wrong" and not timed, one that raises is "failed", one for which the
    time until ``deadline`` (as ``time.monotonic``) does not suffice is "skipped".

    Raises:
        DeviceLost: a failure left the device unusable.
    """
    seconds = 0.02 if options.quick and options.device == "cpu" else options.seconds * _TIMED_SHARE
    groups = _groups(case, options, results)
    measured = _Measurement(case, results, deadline, seconds)
    compiled = 0
    progress = tqdm(groups, desc=case.name, unit="group")
    for group, following in zip(progress, [*groups[1:], None], strict=True):
        cell = group.cell
        progress.set_postfix_str(f"{cell.shape}, r={cell.R}, p={cell.dropout_p}")
        measured.add(group)
        # compiled code that fits is found again by the next cell; dropout alone keeps that of the floor
        compiled += sum(provider.compiled for provider in group.providers)
        keep = following is not None and replace(following.cell, dropout_p=cell.dropout_p) == cell
        keep = keep and compiled + len(following.providers) <= _MOST_COMPILED
        free(cell.device, keep_compiled=keep)
        compiled *= keep


class _Measurement:
    """What groups share: the budget, and how long compiling took."""

    def __init__(self, case: StepCase, results: Results, deadline: float, seconds: float):
        self.case, self.results, self.deadline, self.seconds = case, results, deadline, seconds
        self.compile_seconds: list[float] = []

    def add(self, group: _Group) -> None:
        """Measure one group; add its rows, and print who is skipped."""
        rows = {p.name: new_step_row(group.cell, p, "ok") for p in (*group.floors, *group.providers)}
        wanted = [rows[provider.name] for provider in group.providers]
        try:
            with isolated(list(rows.values()), group.cell.device):
                self._measure(group, rows)
        except DeviceLost as error:
            error.rows = [row for row in error.rows if row in wanted]
            raise
        for row in wanted:
            if row["status"] != "ok":
                said = f"{row['provider']} {row['status']}: {row['reason']}"
                tqdm.write(f"{row['shape']}, p={row['dropout_p']}, {said}", file=sys.stderr)
        self.results.add(wanted)

    def _measure(self, group: _Group, rows: dict[str, dict]) -> None:
        cell = group.cell
        generator = torch.Generator(cell.device).manual_seed(_SEED)
        if self._skips(None, list(rows.values())):
            return
        tensors = self.case.make_inputs(cell, generator)
        gate, calls = Gate(self.case, cell, tensors), {}
        for provider in (*group.floors, *group.providers):
            row = rows[provider.name]
            if self._skips(provider, [row]):
                continue
            with isolated([row], cell.device):
                call = self._prepare(gate, provider, row)
                if row["status"] == "ok":
                    calls[provider.name] = call
        del gate
        for name, call in calls.items():
            with isolated([rows[name]], cell.device, fatal=False):
                _measure_memory(call, tensors, rows[name], cell.device)
        self._time(cell, calls, rows)

    def _skips(self, provider: StepProvider | None, rows: Sequence[dict]) -> bool:
        left = self.deadline - time.monotonic()
        needed = 0.0
        if provider and provider.compiled and rows[0]["compiled"]:
            needed = max(self.compile_seconds, default=_COMPILE_SECONDS)
        if left > needed:
            return False
        advice = f" and compiling takes about {needed:.0f}" if needed else ""
        for row in rows:
            row.update(status="skipped", reason=f"{max(left, 0.0):.0f} s of the budget are left{advice}")
        return True

    def _prepare(self, gate: Gate, provider: StepProvider, row: dict) -> TrainingCall:
        """Build a provider, run it once and judge it."""
        begin = time.perf_counter()
        cell, dy = gate.cell, gate.tensors["dy"]
        layer = provider.build(cell, gate.tensors)
        call = TrainingCall(layer, dy)
        call.backward(call.forward())
        call.drop_gradients()
        synchronize(cell.device)
        row["first_s"] = time.perf_counter() - begin
        if provider.compiled:
            self.compile_seconds.append(row["first_s"])
        # the floors compute something else, and are stock PyTorch and transformers themselves
        if provider.name not in (self.case.floor, self.case.compiled_floor):
            row.update(self._known(gate, provider) or _judge(gate, provider, layer))
        return call

    def _known(self, gate: Gate, provider: StepProvider) -> dict[str, object] | None:
        judged_at = gate.cell_of(provider)
        if judged_at == gate.cell:
            return None
        # judged without dropout, as it has been if that cell came before
        row = self.results.rows(judged_at).get(provider.name)
        if row is None or row["status"] not in ("ok", "wrong"):
            return None
        return {key: row[key] for key in ("gate", "status", "reason")}

    def _time(self, cell: StepCell, calls: dict[str, TrainingCall], rows: dict[str, dict]) -> None:
        runs: dict[str, Step] = {}
        for name, call in calls.items():
            with isolated([rows[name]], cell.device):
                runs[name] = Step(call, cell.device)
        if not runs:
            return
        gc.collect()
        # what lives to the end of the run need not be looked at in the midst of a step
        gc.freeze()
        timings = interleave(runs, cell.device, self.seconds)
        gc.unfreeze()
        floor, compiled_floor = (timings.get(name) for name in (self.case.floor, self.case.compiled_floor))
        for name, timing in timings.items():
            for column, key in (("fwd", "fwd"), ("bwd", "bwd"), ("step", "both")):
                rows[name][column] = timing[key].columns(floor[key] if floor else None)
                is_relative = rows[name]["compiled"] and compiled_floor
                ratio = timing[key].ratio(compiled_floor[key]) if is_relative else None
                rows[name][column]["ratio_compiled"] = ratio
            rows[name]["host_ms"] = median(runs[name].host_ms)


def _judge(gate: Gate, provider: StepProvider, layer: object) -> dict[str, object]:
    at_own_cell = gate.cell_of(provider) == gate.cell
    ratios = gate.judge(provider, layer if at_own_cell else None)
    merged: dict[str, float] = {}
    for name, ratio in ratios.items():
        # dlayers.0.self_attn.q_proj.a: the worst of all layers stands for a projection
        key = "d" + ".".join(name.split(".")[-2:]) if "." in name else name
        merged[key] = max(merged.get(key, 0.0), ratio)
    return verdict(merged)


def _measure_memory(call: TrainingCall, tensors: dict[str, Tensor], row: dict, device: str) -> None:
    if device == "cuda":
        row["activations_gib"] = _allocated_by_forward(call) / 2**30
        row["peak_gib"] = peak_mib(call) / 2**10
    else:
        known = [tensors["x"], *tensors.values(), *call.layer.leaves.values()]
        row["activations_gib"] = kept(call, known)[0] / 2**10
    call.drop_gradients()


def _allocated_by_forward(call: TrainingCall) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = call.forward()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    del y
    return after - before
