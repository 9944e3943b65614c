"""The host-time benchmark runs where there is no GPU, and says what it should."""

import json

import pytest

from benchmarks import host_time


def test_it_times_every_layer_and_breaks_ours_down(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "host.json"
    arguments = ["--device", "cpu", "--size", "32", "--tokens", "2", "--seconds", "0.1", "--out", str(out)]
    assert host_time.main(arguments) == 0
    found = json.loads(out.read_text())
    rows = {(row["layer"], row["M"]): row for row in found["rows"]}
    assert {M for _, M in rows} == {2}
    assert rows["frozen", 2]["ratio"] == 1
    assert all(row["fwd"] > 0 and row["bwd"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert {"ours bf16", "ours fp32", "peft bf16", "peft fp32"} <= {layer for layer, _ in rows}
    text = out.with_suffix(".txt").read_text()
    assert "lora_linear  functional.py" in text
    assert "forward and backward" in text
    assert "run_backward" in text
    assert "ours bf16" in capsys.readouterr().out
