"""The experiment with SALOR, in small: what it writes holds what it promises."""

import json

import salor_experiment
from test_demo import TEXT, tiny_model  # noqa: F401


def test_the_experiment_measures_structures_beside_lora(tiny_model, tmp_path, capsys):  # noqa: F811
    texts = [tmp_path / f"text{i}.py" for i in range(3)]
    for path in texts:
        path.write_text(TEXT, encoding="utf-8")
    sizes = ["--steps", "3", "--length", "32", "--held-out", "2", "--arms", "lora", "unstructured", "rank"]
    folders = ["--out", str(tmp_path / "out"), "--plots", str(tmp_path / "plots")]
    salor_experiment.main(["--model", str(tiny_model), *sizes, *folders, "--text", *map(str, texts)])
    (path,) = (tmp_path / "out").glob("*.json")
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert list(runs) == ["lora", "unstructured", "rank"]
    # rank 16 on layers of 1,024 rows and columns together: half of A stays, and a tenth of B
    assert [run["trainable"] for run in runs.values()][:2] == [16384, 4915]
    ranks = runs["rank"]["ranks"]
    assert sum(int(rank) * count for rank, count in ranks.items()) == 14 * 16 / 2
    assert len({run["held_out_loss"]["0"] for run in runs.values()}) == 1
    assert runs["unstructured"]["file_bytes"] < runs["lora"]["file_bytes"]
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["salor.png", "salor_rank.png"]
    assert "| rank | " in capsys.readouterr().out
