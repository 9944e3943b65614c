"""The benchmark of whole training steps runs end to end without a GPU, on a model of the same making."""

from dataclasses import replace

import pytest
import torch

from benchmarks import plot, profile_step, table
from benchmarks.case import Layer
from benchmarks.cases.llama_step import CASE, _frozen, _ours, _stack
from benchmarks.gate import FACTOR, Gate, rms_ratio
from benchmarks.measure_step import step_cells
from benchmarks.options import Options
from benchmarks.results import load
from benchmarks.run import main, run
from benchmarks.step_case import StepProvider
from benchmarks.timing import Step, TrainingCall

pytest.importorskip("transformers")
pytest.importorskip("peft")

EAGER = ["frozen", "peft_fp32", "peft", "ours_fp32", "ours"]
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
GATED = {"y", "dx"} | {f"d{name}.{letter}" for name in PROJECTIONS for letter in "ab"}


def options(folder, **changes):
    defaults = {"device": "cpu", "shapes": ("2x16",), "ranks": (4,), "dropouts": (0.0,), "tokens": ()}
    return Options(**defaults | {"quick": True, "seconds": 600.0, "out": folder} | changes)


def tiny_cell(folder=None, **changes):
    return step_cells(CASE, options(folder, **changes))[0]


def tiny_inputs(cell):
    return CASE.make_inputs(cell, torch.Generator().manual_seed(0))


def scaled(name, factor):
    """Ours with one projection's adapter off by ``factor`` in one layer."""

    def build(cell, tensors):
        wrong = "layers.1.mlp.up_proj.b"
        return _ours(cell, tensors | {wrong: tensors[wrong] * factor}, fp32=False)

    return StepProvider(name, build, same_mask=True)


def broken(cell, tensors):
    raise RuntimeError("no such kernel\nsecond line")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run with and without dropout over all default providers, a wrong one and one that raises."""
    more = (scaled("wrong", 2.0), StepProvider("broken", broken))
    case = replace(CASE, providers=(*CASE.providers, *more))
    return run(case, options(tmp_path_factory.mktemp("results"), dropouts=(0.0, 0.05)))


def rows_of(path, **wanted):
    return [row for row in load(path)["rows"] if wanted.items() <= row.items()]


def test_every_eager_provider_is_timed_without_a_gpu(quick):
    data = load(quick)
    assert data["complete"]
    for dropout_p in (0.0, 0.05):
        timed = [row["provider"] for row in rows_of(quick, status="ok", dropout_p=dropout_p)]
        assert timed == EAGER
    for row in rows_of(quick, status="ok"):
        assert row["M"] == 32
        assert 0 < row["step"]["q1"] <= row["step"]["ms"] <= row["step"]["q3"]
        assert row["step"]["ratio"] > 0
        assert row["host_ms"] > 0
        assert row["activations_gib"] > 0


def test_floor_has_ratio_one(quick):
    assert {row["step"]["ratio"] for row in rows_of(quick, provider="frozen")} == {1.0}


def test_rows_have_every_column(quick):
    columns = set(load(quick)["rows"][0])
    assert all(set(row) == columns for row in load(quick)["rows"])


def test_gradients_of_all_projections_are_gated(quick):
    for row in rows_of(quick, status="ok"):
        assert set(row["gate"]) == (set() if row["provider"] == "frozen" else GATED)
        assert all(ratio <= FACTOR for ratio in row["gate"].values())


def test_wrong_provider_is_named_and_not_timed(quick):
    rows = rows_of(quick, provider="wrong")
    assert [row["status"] for row in rows] == ["wrong", "wrong"]
    for row in rows:
        assert "unfused PyTorch" in row["reason"]
        assert row["step"] is None
        assert row["activations_gib"] is None


def test_failing_provider_is_recorded_in_one_sentence(quick):
    rows = rows_of(quick, provider="broken")
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", "RuntimeError: no such kernel")}


def test_other_peoples_masks_are_judged_once_without_dropout(quick):
    without, with_dropout = rows_of(quick, provider="peft")
    assert without["gate"] == with_dropout["gate"]
    without, with_dropout = rows_of(quick, provider="ours")
    assert without["gate"] != with_dropout["gate"]


def test_dropout_keeps_no_more_memory_and_peft_does(quick):
    kept = {(r["provider"], r["dropout_p"]): r["activations_gib"] for r in rows_of(quick, status="ok")}
    seeds = 4 * len(PROJECTIONS) * 8 / 2**30
    assert kept["ours", 0.05] <= kept["ours", 0.0] + seeds
    assert kept["ours", 0.05] < kept["peft", 0.05]
    assert kept["frozen", 0.0] < kept["ours", 0.0] <= kept["peft", 0.0]


def test_table_and_plot_are_drawn_from_the_file(quick, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    text = quick.with_suffix(".md").read_text()
    assert text == table.render(load(quick))
    assert "failed: RuntimeError: no such kernel" in text
    assert table.main([str(quick), "--dropout", "0", "--providers", "ours"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[0] == "| sequences × tokens | dropout | r | frozen | ours |"
    assert lines[2].startswith("| 2 × 16 | 0.0 | 4 | ")
    assert plot.main([str(quick), "--out", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(quick), "--rank", "5"]) == 2


@pytest.fixture
def without_compiling():
    """The case with its compiled providers replaced by what they compile."""
    frozen = StepProvider("frozen_compiled", _frozen, compiled=True)
    ours = StepProvider("ours_compiled", lambda cell, t: _ours(cell, t, fp32=False), compiled=True)
    return replace(CASE, providers=(CASE.provider("frozen"), frozen, ours))


def test_compiled_providers_are_compared_with_both_floors(without_compiling, tmp_path):
    path = run(without_compiling, options(tmp_path, providers=("ours_compiled",)))
    rows = {row["provider"]: row for row in load(path)["rows"]}
    assert list(rows) == ["frozen", "frozen_compiled", "ours_compiled"]
    assert len(load(path)["rows"]) == 3  # the floor is timed again and written once
    assert rows["frozen"]["step"]["ratio_compiled"] is None
    assert rows["frozen_compiled"]["step"]["ratio_compiled"] == 1.0
    assert rows["ours_compiled"]["step"]["ratio"] > 0
    assert rows["ours_compiled"]["step"]["ratio_compiled"] > 0
    assert f"({rows['ours_compiled']['step']['ratio_compiled']:.2f})" in path.with_suffix(".md").read_text()


def test_a_short_budget_skips_compiling_and_resumes(without_compiling, tmp_path, capsys):
    wanted = options(tmp_path, providers=("ours_compiled",), seconds=40.0)
    path = run(without_compiling, wanted)
    assert not load(path)["complete"]
    assert {row["provider"]: row["status"] for row in load(path)["rows"]} == {
        "frozen": "ok",
        "frozen_compiled": "skipped",
        "ours_compiled": "skipped",
    }
    assert "p=0.0, ours_compiled skipped: " in capsys.readouterr().err
    assert run(without_compiling, replace(wanted, seconds=600.0, resume=path)) == path
    assert {row["status"] for row in load(path)["rows"]} == {"ok"}
    assert len(load(path)["rows"]) == 3


def test_a_spent_budget_skips_everything(tmp_path):
    path = run(CASE, options(tmp_path, seconds=1e-9))
    assert {row["status"] for row in load(path)["rows"]} == {"skipped"}
    assert not load(path)["complete"]


def test_base_weights_are_shared_and_adapters_are_not():
    cell = tiny_cell()
    tensors = tiny_inputs(cell)
    for name, parameter in _stack(cell, tensors).named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr()
    layers = [CASE.provider(name).build(cell, tensors) for name in EAGER[1:]]
    for name in layers[0].leaves:
        shared = {layer.leaves[name].data_ptr() for layer in layers}
        assert len(shared) == (1 if name == "x" else len(layers))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("peft", torch.bfloat16),
        ("peft_fp32", torch.float32),
        ("ours", torch.bfloat16),
        ("ours_fp32", torch.float32),
    ],
)
def test_adapters_have_the_dtype_that_the_name_says(name, dtype):
    cell = tiny_cell()
    leaves = CASE.provider(name).build(cell, tiny_inputs(cell)).leaves
    assert {leaf.dtype for key, leaf in leaves.items() if key != "x"} == {dtype}
    assert len(leaves) == 1 + 4 * 2 * len(PROJECTIONS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gate_notices_one_wrong_adapter(dropout_p):
    cell = tiny_cell(dropouts=(dropout_p,))
    gate = Gate(CASE, cell, tiny_inputs(cell))
    assert max(gate.judge(scaled("same", 1.0)).values()) <= FACTOR
    assert max(gate.judge(scaled("wrong", 1.2)).values()) > FACTOR


def test_gate_notices_one_wrong_gradient():
    def build(cell, tensors):
        layer = _ours(cell, tensors, fp32=False)
        layer.leaves["layers.2.self_attn.k_proj.a"].register_hook(lambda gradient: 1.2 * gradient)
        return Layer(layer.forward, layer.leaves)

    cell = tiny_cell()
    ratios = Gate(CASE, cell, tiny_inputs(cell)).judge(StepProvider("wrong", build))
    assert [name for name, ratio in ratios.items() if ratio > FACTOR] == ["dlayers.2.self_attn.k_proj.a"]


def test_a_step_leaves_gradients_where_an_optimiser_finds_them_and_drops_them_after():
    cell = tiny_cell()
    tensors = tiny_inputs(cell)
    layer = CASE.provider("ours").build(cell, tensors)
    call = TrainingCall(layer, tensors["dy"])
    call.backward(call.forward())
    assert all(leaf.grad.abs().max() > 0 for leaf in layer.leaves.values())
    step = Step(call, "cpu")
    assert len(step.run(lambda: 0.0)) == 3
    assert all(leaf.grad is None for leaf in layer.leaves.values())
    assert len(step.host_ms) == 1


def test_rms_ratio_compares_the_mean_errors():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    baseline = (truth + 0.01).float()
    assert rms_ratio((truth - 0.02).float(), baseline, truth) == pytest.approx(2.0, rel=1e-4)
    assert rms_ratio(truth.float() * torch.nan, baseline, truth) == float("inf")
    # a baseline without error asks for no more than rounding once
    rounded = truth.bfloat16()
    assert rms_ratio(rounded, truth.bfloat16().double().bfloat16(), rounded.double()) == 0.0
    assert 0.5 < rms_ratio(rounded, truth, truth) < 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "8"], "llama_step: --tokens must be left out, got [8]"),
        (["--impl", "triton"], "llama_step: --impl must be left out, got triton"),
        (["--adapter-dtype", "float32"], "llama_step: --adapter-dtype must be left out, got float32"),
        (["--shapes", "huge"], "shape must be one of 2x16, 1x8 or BATCHxLENGTH, got huge"),
        (["--providers", "nobody"], "llama_step: provider must be one of frozen, peft_fp32"),
    ],
)
def test_what_does_not_fit_the_case_is_refused_before_anything_is_written(
    arguments, message, tmp_path, capsys
):
    flags = ["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    assert main(["llama_step", *flags, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_prints_the_table(tmp_path, capsys):
    flags = ["--device", "cpu", "--quick", "--shapes", "3x5", "--ranks", "3", "--dropout", "0"]
    assert main(["llama_step", *flags, "--providers", "ours", "--out", str(tmp_path)]) == 0
    assert "| 3 × 5 | 0.0 | 3 | " in capsys.readouterr().out


def test_default_cells_are_those_of_the_issue_in_order():
    wanted = Options(ranks=CASE.ranks, dropouts=CASE.dropouts)
    assert [(c.batch, c.length, c.R, c.dropout_p, c.model) for c in step_cells(CASE, wanted)] == [
        (2, 4096, 16, 0.0, "llama-3-8b"),
        (2, 4096, 16, 0.05, "llama-3-8b"),
        (1, 1024, 16, 0.0, "llama-3-8b"),
        (1, 1024, 16, 0.05, "llama-3-8b"),
    ]
    compiled = {
        (c.M, p.name)
        for c in step_cells(CASE, wanted)
        for p in CASE.providers
        if p.compiled and p.by_default(c)
    }
    assert compiled == {(8192, f"{name}_compiled") for name in ("frozen", "peft", "ours")}


def test_profile_takes_the_case(capsys):
    flags = ["--case", "llama_step", "--device", "cpu", "--shape", "1x8", "--rank", "4"]
    assert profile_step.main(flags) == 0
    text = capsys.readouterr().out
    assert "tiny, 1 x 8 tokens, r=4, dropout 0.0" in text
    assert "ours bwd: 0.0 µs in 0 launches" in text  # a CPU has no kernels to list
