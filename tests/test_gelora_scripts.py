"""The scripts around GeLoRA, in small: what they write holds what they promise."""

import json
from pathlib import Path

import gelora_experiment
from test_demo import TEXT, tiny_model  # noqa: F401

from benchmarks import mixed_ranks, nearest_neighbors


def only_json(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_experiment_trains_both_arms_with_equal_parameters(tiny_model, tmp_path):  # noqa: F811
    texts = [tmp_path / f"text{i}.py" for i in range(3)]
    for path in texts:
        path.write_text(TEXT, encoding="utf-8")
    sizes = ["--steps", "3", "--length", "32", "--held-out", "2", "--points", "40", "--point-length", "16"]
    folders = ["--out", str(tmp_path / "out"), "--plots", str(tmp_path / "plots")]
    options = ["--model", str(tiny_model), "--rank", "4", "--seeds", "0", "1", *sizes, *folders]
    gelora_experiment.main([*options, "--text", *map(str, texts)])
    results = only_json(tmp_path / "out")
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        ("uniform", 0), ("gelora", 0), ("uniform", 1), ("gelora", 1),
    ]  # fmt: skip
    assert {run["trainable"] for run in results["runs"]} == {results["geometry"]["parameters"]}
    # the same windows and the same model before the first step
    assert results["runs"][0]["held_out_loss"]["0"] == results["runs"][1]["held_out_loss"]["0"]
    assert len(results["summary"]["gelora_minus_uniform"]) == 2
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["gelora.png", "gelora_ranks.png"]


def test_the_neighbour_benchmark_measures_time_and_error(tmp_path, capsys):
    options = [
        "--device",
        "cpu",
        "--points",
        "200",
        "--width",
        "16",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert nearest_neighbors.main(options) == 0
    rows = only_json(tmp_path)["rows"]
    assert [(row["data"], row["dtype"]) for row in rows] == [
        ("gaussian", "float32"), ("gaussian", "bfloat16"), ("manifold", "float32"), ("manifold", "bfloat16"),
    ]  # fmt: skip
    for row in rows:
        assert row["ours"]["ms"] > 0
        assert row["ours"]["repeats"]
        assert max(row["ours"]["error"].values()) < 2**-16
    # what the products of cdist lose on near-duplicates
    assert rows[2]["cdist_topk"]["error"]["first"] > 10 * rows[2]["ours"]["error"]["first"]


def test_the_rank_benchmark_compares_equal_parameters(tmp_path, capsys):
    options = ["--device", "cpu", "--tokens", "8", "--size", "16", "--rounds", "2", "--out", str(tmp_path)]
    assert mixed_ranks.main(options) == 0
    for row in only_json(tmp_path)["rows"].values():
        assert len(set(row["ranks"])) == 30
        assert sum(row["ranks"]) == 30 * row["uniform_rank"]
        assert min(row["eager"]["ratio"], *row["eager"]["ms"].values()) > 0
