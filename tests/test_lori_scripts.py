"""LoRI's experiment in small: it trains every arm, and what it writes holds what it promises."""

import json
from pathlib import Path

import lori_experiment
import pytest
from test_demo import TEXT, demo, texts, tiny_model  # noqa: F401

PROSE = "the value of a name is looked up in the scope that binds it. " * 40


def test_the_experiment_trains_merges_and_continues_every_method(tiny_model, tmp_path):  # noqa: F811
    for name, text in {"a.py": TEXT, "b.py": TEXT, "a.txt": PROSE, "b.txt": PROSE}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sizes = [
        "--steps",
        "2",
        "--trial-steps",
        "1",
        "--batch",
        "2",
        "--length",
        "32",
        "--held-out",
        "2",
        "--weights",
        "0.5",
    ]
    files = {"--code": ("a.py", "b.py"), "--prose": ("a.txt", "b.txt")}
    inputs = [str(word) for flag, names in files.items() for word in (flag, *(tmp_path / n for n in names))]
    folders = ["--out", str(tmp_path / "out"), "--plots", str(tmp_path / "plots")]
    options = ["--device", "cpu", "--rank", "4", "--model", str(tiny_model), *sizes, *inputs, *folders]
    lori_experiment.main(options)
    (path,) = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    arms = [(run["method"], run["task"]) for run in results["single"]]
    assert arms == [(m, t) for m in ("lora", "lori-d", "lori-s") for t in ("code", "prose")]
    dense, sparse = (run["trainable"] for run in results["single"][2:5:2])
    assert sparse == results["masks"]["entries"] == int((1 - 0.9) * dense)
    assert [(run["method"], run["merge"]) for run in results["merged"]] == [
        (m, how) for m in ("lora", "lori-d", "lori-s") for how in ("cat", "linear")
    ]
    for run, single in zip(results["continual"], results["single"][::2], strict=True):
        assert run["before"]["code"] == pytest.approx(single["held_out_loss"]["code"], rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["lori_experiment.png", "lori_mask.png"]


def test_the_demo_calibrates_and_trains_a_sparse_adapter(tiny_model, texts, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    demo("--method", "lori", "--model", tiny_model, "--steps", 6, "--rank", 8, "--out", out, "--text", *texts)
    printed = capsys.readouterr().out
    # (32 + 16 + 16 + 32 + 64 + 64 + 32) outputs of two blocks, rank 8, a tenth
    assert "kept 409 entries of B, 10 % in all: q_proj" in printed
    assert "trainable  409 of" in printed
    assert "unfused PyTorch" in printed
    fields = json.loads((Path(out) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert fields["peft_type"] == "LORI"
