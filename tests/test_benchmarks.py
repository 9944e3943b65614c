"""The benchmarks run end to end on a CPU, time nothing that is wrong, and lose nothing when stopped."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases, plot, profile_step, table
from benchmarks.case import Cell, Layer, Provider
from benchmarks.cases.lora_linear import CASE
from benchmarks.gate import FACTOR, Gate
from benchmarks.measure import _assign, kept
from benchmarks.measure_cell import DeviceLost, new_row
from benchmarks.results import Results, load, write_atomic
from benchmarks.run import Options, cells, main, run
from benchmarks.timing import Call, Timing, calls_needed, copies_needed
from lowrank_ops import reference
from lowrank_ops.testing import assert_as_accurate

TINY = Cell("tiny", 24, 40, 32, 4, 0.0, torch.bfloat16, torch.bfloat16, "cpu")
PASSES = ("fwd", "bwd", "both")


def tiny_inputs(cell=TINY):
    return CASE.make_inputs(cell, torch.Generator().manual_seed(0))


def variant(name, change):
    """A provider that is unfused PyTorch except for what ``change`` does to y."""

    def build(cell, tensors):
        layer = CASE.provider("unfused").build(cell, tensors)
        return Layer(lambda: change(layer.forward()), layer.leaves)

    return Provider(name, build)


def raising(name, error):
    def build(cell, tensors):
        raise error

    return Provider(name, build)


def options(folder, **changes):
    defaults = {"device": "cpu", "ranks": (4,), "tokens": (32, 1), "quick": True, "seconds": 60.0}
    return Options(**defaults | {"out": folder} | changes)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run over all default providers, a wrong one and one that raises."""
    wrong = variant("wrong_scale", lambda y: y * 1.05)
    broken = raising("broken", RuntimeError("no such kernel\nsecond line"))
    case = replace(CASE, providers=(*CASE.providers, wrong, broken))
    return run(case, options(tmp_path_factory.mktemp("results")))


def test_every_default_provider_is_timed(quick):
    data = load(quick)
    assert data["complete"]
    timed = {row["provider"] for row in data["rows"] if row["status"] == "ok"}
    assert timed == {"frozen", "unfused", "addmm", "peft", "peft_fp32", "ours"}


def test_wrong_provider_is_named_and_not_timed(quick):
    rows = [row for row in load(quick)["rows"] if row["provider"] == "wrong_scale"]
    assert rows
    for row in rows:
        assert row["status"] == "wrong"
        assert row["gate"]["y"] > FACTOR
        assert "unfused PyTorch" in row["reason"]
        assert row["fwd"] is None
        assert row["host_us"] is None


def test_failing_provider_is_recorded_in_one_sentence(quick):
    rows = [row for row in load(quick)["rows"] if row["provider"] == "broken"]
    assert rows
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", "RuntimeError: no such kernel")}


def test_rows_have_every_column(quick):
    data = load(quick)
    assert data["environment"]["torch"] == torch.__version__
    assert data["peaks"]["copy_gb_per_s"] > 0
    assert data["peaks"]["matmul_tflop_per_s"] > 0
    columns = set(data["rows"][0])
    for row in data["rows"]:
        assert set(row) == columns
        if row["status"] == "ok":
            for key in PASSES if row["M"] > 1 else ("fwd",):
                assert 0 < row[key]["q1"] <= row[key]["ms"] <= row[key]["q3"]
                assert row[key]["ratio"] > 0
            assert row["host_us"] > 0
            assert row["roofline"]["fwd"] > 0


def test_one_token_is_timed_forward_only_and_without_dropout(quick):
    rows = [row for row in load(quick)["rows"] if row["M"] == 1]
    assert rows
    assert all(row["bwd"] is None and row["both"] is None and row["dropout_p"] == 0 for row in rows)


def test_floor_has_ratio_one(quick):
    rows = [row for row in load(quick)["rows"] if row["provider"] == "frozen"]
    assert {row["fwd"]["ratio"] for row in rows} == {1.0}


def test_table_lies_beside_the_results_and_renders_again(quick, capsys):
    text = quick.with_suffix(".md").read_text()
    assert text == table.render(load(quick))
    assert "| wrong |" in text
    assert "failed: RuntimeError: no such kernel" in text
    assert table.main([str(quick), "--tokens", "32", "--providers", "ours"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[0] == "| M × K → N | frozen | ours |"
    assert lines[2].startswith("| 32 × 64 → 96 (even) | ")


def test_tables_of_missing_rows_and_files_say_so(quick, capsys, tmp_path):
    assert table.main([str(quick), "--rank", "99"]) == 2
    assert "no such rows" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert table.main([str(tmp_path / "other.json")]) == 2
    assert "must have schema 1, got None" in capsys.readouterr().err


def test_plot_is_a_png(quick, tmp_path):
    pytest.importorskip("matplotlib")
    assert plot.main([str(quick), "--out", str(tmp_path / "plot.png"), "--rank", "4", "--tokens", "32"]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(quick), "--rank", "5"]) == 2


@pytest.mark.parametrize("name", ["unfused", "addmm", "ours"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gate_passes_correct_layers(name, dropout_p, adapter_dtype):
    cell = replace(TINY, dropout_p=dropout_p, adapter_dtype=adapter_dtype)
    ratios = Gate(CASE, cell, tiny_inputs(cell)).judge(CASE.provider(name))
    assert set(ratios) == {"y", "dx", "da", "db"}
    assert max(ratios.values()) <= FACTOR


def unwritten(y):
    # right unless the memory that it reads and nobody wrote holds NaN
    return y + 0 * torch.empty_like(y).detach()


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.02, lambda y: y[:-1], lambda y: y.float(), unwritten],
    ids=["scaled", "short", "float32", "unwritten"],
)
def test_gate_refuses_wrong_layers(change):
    torch.use_deterministic_algorithms(False)  # the gate itself must poison memory, not the tests' fixture
    provider = variant("wrong", change)
    cell, tensors = TINY, tiny_inputs()
    if change(tensors["dy"]).shape != tensors["dy"].shape:
        cell, tensors = replace(TINY, M=1, N=960), tiny_inputs(replace(TINY, M=1, N=960))
    assert not max(Gate(CASE, cell, tensors).judge(provider).values()) <= FACTOR


def test_gate_refuses_a_wrong_gradient():
    wrong = variant("wrong", lambda y: y * 1.03 - (y * 0.03).detach())
    ratios = Gate(CASE, TINY, tiny_inputs()).judge(wrong)
    assert max(ratios["dx"], ratios["da"], ratios["db"]) > FACTOR


def test_gate_judges_dropout_under_the_mask_of_the_reference():
    shifted = CASE.provider("ours").build
    other_mask = Provider(
        "other", lambda cell, t: shifted(replace(cell, dropout_p=cell.dropout_p + 0.1), t), same_mask=True
    )
    cell = replace(TINY, dropout_p=0.3)
    assert Gate(CASE, cell, tiny_inputs(cell)).judge(other_mask)["y"] > FACTOR


def test_stopped_run_leaves_a_valid_file_and_resumes(tmp_path):
    built = []

    def build(cell, tensors):
        if cell.shape == "ragged" and len(built) < 100:
            built.extend([0] * 100)
            raise KeyboardInterrupt
        return CASE.provider("unfused").build(cell, tensors)

    case = replace(CASE, providers=(CASE.provider("frozen"), Provider("stopping", build)))
    wanted = options(tmp_path, tokens=(8,), dropouts=(0.0,))
    with pytest.raises(KeyboardInterrupt):
        run(case, wanted)
    (path,) = tmp_path.glob("*.json")
    data = load(path)
    assert [row["provider"] for row in data["rows"]] == ["frozen", "stopping"]
    assert not data["complete"]
    assert "Incomplete" in path.with_suffix(".md").read_text()
    assert run(case, replace(wanted, resume=path)) == path
    assert load(path)["complete"]
    assert load(path)["rows"][:2] == data["rows"]
    assert len(load(path)["rows"]) == 4
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]


def test_lost_device_keeps_what_it_cost(tmp_path):
    # on a CPU no device is lost: the provider raises what the cell raises when one is
    lost = new_row(replace(TINY, shape="even", N=96, K=64, M=32), "losing", "failed", "illegal address")
    case = replace(CASE, providers=(CASE.provider("frozen"), raising("losing", DeviceLost([lost]))))
    with pytest.raises(DeviceLost, match="illegal address") as caught:
        run(case, options(tmp_path))
    assert load(caught.value.path)["rows"] == [lost]
    resumed = replace(case, providers=(CASE.provider("frozen"), CASE.provider("unfused")))
    run(resumed, options(tmp_path, resume=caught.value.path, tokens=(32,), dropouts=(0.0,)))
    rows = load(caught.value.path)["rows"]
    assert [row["provider"] for row in rows if row["shape"] == "even"] == ["losing", "frozen", "unfused"]


def test_spent_budget_skips_the_last_cells(tmp_path):
    path = run(CASE, options(tmp_path, seconds=1e-9, providers=("unfused",)))
    data = load(path)
    assert {row["status"] for row in data["rows"]} == {"skipped"}
    assert not data["complete"]
    assert {row["provider"] for row in data["rows"]} == {"frozen", "unfused"}


def test_file_names_are_never_reused(tmp_path):
    environment = {"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-08-01"}
    names = [Results.create(tmp_path, CASE, environment, {}).path.name for _ in range(2)]
    assert names == [
        "lora_linear-h100-80gb-hbm3-2026-08-01.json",
        "lora_linear-h100-80gb-hbm3-2026-08-01-2.json",
    ]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_most_important_cell_comes_first():
    order = cells(CASE, Options())
    first = order[0]
    assert (first.M, first.N, first.K, first.R, first.dropout_p) == (8192, 4096, 4096, 16, 0.0)
    assert len(order) == len(set(order)) == 84


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "huge"], "shape must be one of even, ragged or KxN, got huge"),
        (["--providers", "nobody"], "provider must be one of frozen, unfused"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    arguments = ["lora_linear", "--device", "cpu", "--quick", "--out", str(tmp_path / "out"), *arguments]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_prints_the_table(tmp_path, capsys):
    flags = ["--device", "cpu", "--quick", "--shapes", "33x50", "--tokens", "8", "--dropout", "0"]
    assert main(["lora_linear", *flags, "--providers", "addmm", "--out", str(tmp_path)]) == 0
    assert "| 8 × 33 → 50 (33x50) | " in capsys.readouterr().out


def test_every_case_file_is_listed_and_loads():
    folder = Path(cases.__file__).parent
    assert cases.names() == sorted(path.stem for path in folder.glob("[!_]*.py"))
    for name in cases.names():
        case = cases.load(name)
        assert case.name == name
        assert case.provider(case.floor) is case.providers[0]
    with pytest.raises(ValueError, match=f"case must be one of {', '.join(cases.names())}, got nothing"):
        cases.load("nothing")


def test_kept_memory_counts_storages_once_and_no_inputs():
    tensors = tiny_inputs()
    call = Call(CASE.provider("addmm").build(TINY, tensors), tensors["dy"])
    mib, keeps_x = kept(call, [tensors["x"], *tensors.values()])
    assert mib * 2**20 == 2 * TINY.M * TINY.R  # h, in bfloat16
    assert keeps_x
    floor = Call(CASE.provider("frozen").build(TINY, tensors), tensors["dy"])
    assert kept(floor, [tensors["x"], *tensors.values()]) == (0.0, False)


def test_ratios_are_taken_within_rounds():
    floor, mine = Timing([1.0, 2.0, 4.0]), Timing([2.0, 4.0, 8.0])
    assert mine.ratio(floor) == 2.0
    assert mine.quartiles == (3.0, 4.0, 6.0)


def test_rotating_inputs_are_over_three_times_the_cache():
    l2 = 50 * 2**20
    for size in (2**20, 2**24, 2**28):
        copies = copies_needed(size, l2)
        assert copies >= 2
        assert copies * size > 3 * l2 or copies == 48
        assert calls_needed(copies, 1e-5) % copies == 0
    assert calls_needed(2, 1.0) == 2


def test_kernels_belong_to_the_pass_in_which_they_start():
    def event(cat, name, ts, dur):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", "pass:ours:fwd", 0.0, 100.0),
        event("user_annotation", "pass:ours:bwd", 101.0, 100.0),
        event("gpu_user_annotation", "pass:ours:fwd", 0.0, 100.0),
        event("kernel", "second", 60.0, 5.0),
        event("kernel", "first", 10.0, 5.0),
        event("gpu_memset", "Memset", 20.0, 5.0),
        event("kernel", "third", 150.0, 5.0),
        {"name": "process_name", "ph": "M"},
    ]
    assert {key: [k["name"] for k in kernels] for key, kernels in _assign(events).items()} == {
        "ours:fwd": ["first", "second"],
        "ours:bwd": ["third"],
    }


def test_profile_writes_json_and_text(tmp_path, capsys):
    flags = ["--device", "cpu", "--shape", "64x96", "--tokens", "8", "--rank", "4", "--out", str(tmp_path)]
    assert profile_step.main(flags) == 0
    text = capsys.readouterr().out
    assert "ours bwd: 0.0 µs in 0 launches" in text  # a CPU has no kernels to list
    assert (tmp_path / "profile.txt").read_text() == text
    assert set(json.loads((tmp_path / "profile.json").read_text())["kernels"]) == {"unfused", "ours"}


@pytest.fixture
def tune():
    pytest.importorskip("triton")
    from benchmarks import tune

    return tune


def test_tuning_candidates_are_distinct(tune):
    from lowrank_ops.kernels import _config

    assert tune.OPS == _config.OPS
    for op in tune.OPS:
        for M in (1, 8192):
            tries = tune.candidates(op, tune.Shape(M, 4096, 14336, 24))
            assert len(tries) == len(set(tries)) > 20
    with pytest.raises(ValueError, match="op must be one of lora_hidden"):
        tune.candidates("lora", tune.Shape(1, 1, 1, 1))


def test_tuned_tiles_are_found_by_pick(tune, monkeypatch):
    from lowrank_ops.kernels import TileConfig, _config

    wanted = TileConfig(BLOCK_ROWS=48, BLOCK_COLS=48, BLOCK_DEPTH=48, PERSISTENT=1, CUBLAS=True)
    shape = tune.Shape(8000, 4096, 14336, 16)
    facts = _config.DeviceFacts(arch="sm90", processors=132)
    for op in ("lora_forward", "lora_backward_input"):
        config = asdict(replace(wanted, CUBLAS=False))
        row = {"op": op, "key": tune.table_key(op, shape), "config": config}
        row |= {"final_ms": 2.0, "cublas_ms": 1.0}
        slower = row | {"final_ms": 3.0, "config": config | {"BLOCK_ROWS": 16}}
        rows = tune.winners([slower, row, row | {"final_ms": None}])
        monkeypatch.setattr(_config, "measured_rows", lambda arch, rows=rows: rows)
        _config.pick.cache_clear()
        assert _config.pick(op, shape.M, shape.N, shape.K, shape.R, torch.bfloat16, facts) == wanted
    _config.pick.cache_clear()


def test_tuning_compares_what_a_forward_pass_returns_without_a_mask(tune):
    shape = tune.Shape(24, 40, 32, 4)
    arguments = tune._arguments("lora_forward", shape, torch.float32, torch.Generator().manual_seed(0))
    assert [t.shape for t in tune._as_tuple(reference.lora_forward(*arguments))] == [(24, 40), (24, 4)]


# lora_forward is left out: its h comes from a kernel on either side
@pytest.mark.parametrize(
    "op", ["lora_hidden", "lora_backward_hidden_b", "lora_backward_a", "lora_backward_input"]
)
def test_tuning_compares_with_the_same_product_by_the_library(tune, op):
    shape = tune.Shape(24, 40, 32, 4)
    arguments = tune._arguments(op, shape, torch.float32, torch.Generator().manual_seed(0))
    actual = tune._as_tuple(tune._cublas(op, arguments))
    truth = tune._as_tuple(getattr(reference, op)(*tune._exact(arguments)))
    baseline = tune._as_tuple(getattr(reference, op)(*arguments))
    for mine, its, exact in zip(actual, baseline, truth, strict=True):
        assert_as_accurate(mine, its, exact)
