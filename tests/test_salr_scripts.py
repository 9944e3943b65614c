"""The scripts around SALR, in small: what they write holds what they promise."""

import json

import salr_experiment
from test_demo import demo, texts, tiny_model  # noqa: F401

SMALL = ["--steps", "2", "--length", "32", "--held-out", "2", "--rank", "3", "--residual-rank", "4"]


def test_the_experiment_writes_one_row_an_arm(tiny_model, texts, tmp_path, capsys):  # noqa: F811
    arms = ["dense", "lora", "pruned", "residual", "frozen", "salr"]
    options = ["--model", str(tiny_model), "--out", str(tmp_path / "out"), *SMALL]
    salr_experiment.main([*options, "--arms", *arms, "--text", *map(str, texts)])
    (path,) = (tmp_path / "out").glob("*.json")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert list(runs) == arms
    assert [run["trainable"] > 0 for run in runs.values()] == [False, True, False, False, True, True]
    assert runs["pruned"]["adapter_parameters"] == 0 < runs["residual"]["adapter_parameters"]
    assert runs["salr"]["adapter_parameters"] == runs["frozen"]["adapter_parameters"]
    assert runs["salr"]["adapter_parameters"] == (
        runs["lora"]["adapter_parameters"] + runs["residual"]["adapter_parameters"]
    )
    assert runs["salr"]["weights_mib"] < 0.7 * runs["dense"]["weights_mib"]
    # the same model before the first step, trained or not
    assert runs["salr"]["held_out_loss"]["0"] == runs["residual"]["held_out_loss"]["0"]
    (rows,) = (tmp_path / "out").glob("*.md")
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 2 + len(arms)


def test_the_demo_prunes_trains_and_reloads(tiny_model, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    demo(
        "--method", "salr", "--model", tiny_model, "--steps", 6, "--rank", 4, "--out", out, "--text", *texts
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["held_out_loss"]["6"] < results["held_out_loss"]["0"]
    assert results["reload_difference"] == 0
    assert set(results["costs"]) == {"FusedPrunedLinear", "unfused PyTorch"}
    assert "bits each" in capsys.readouterr().out
