"""Tables of measured sizes: how tuning writes them, and whose rows a GPU takes."""

import json
from dataclasses import asdict

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import tune, tune_hopper  # noqa: E402
from lowrank_ops.kernels import _config, hopper_lora  # noqa: E402


def test_a_table_is_written_for_the_gpu_at_hand_and_read_before_that_of_its_architecture(
    monkeypatch, tmp_path
):
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"]
    products = [_config.product_of(name) for name in names]
    h100, h200, other = [_config.DeviceFacts(arch="sm90", processors=132, product=p) for p in products]
    monkeypatch.setattr(_config, "TABLES", tmp_path)
    tune.write_table(tmp_path, h100, {"b": {"x": 1}, "a": {"x": 1}}, measured="there")
    tune.write_table(tmp_path, h200, {"a": {"x": 2}}, measured="here")
    path = tune.write_table(tmp_path, h200, {"c": {}}, measured_hopper="too")
    assert path.name == "sm90-H200.json"
    found = {"measured": "here", "rows": {"a": {"x": 2}, "c": {}}, "measured_hopper": "too"}
    assert json.loads(path.read_text()) == found
    rows = {facts: _config.measured_rows.__wrapped__(facts) for facts in (h100, h200, other)}
    assert rows[h100] == rows[other] == {"a": {"x": 1}, "b": {"x": 1}}
    assert rows[h200] == {"a": {"x": 2}, "b": {"x": 1}, "c": {}}


def test_tuned_hopper_launches_are_found_by_their_sizes():
    K, Ns = tune_hopper.sizes_of("4096x14336+14336")
    assert (K, Ns, tune_hopper.sizes_of("8x16")) == (4096, (14336, 14336), (8, (16,)))
    for M, P in ((8192, 1), (2048, 1), (8192, 2)):
        tries = tune_hopper.candidates(M, P)
        assert len(tries) == len(set(tries)) >= 2
    rows = [
        {"key": hopper_lora.table_key("hopper_forward", 8192, Ns, K), "config": asdict(c), "ms": ms}
        for c, ms in zip(tries, (3.0, None, 1.0, 2.0), strict=True)
    ]
    assert tune_hopper.winners(rows) == {"hopper_forward M=8192 N=14336+14336 K=4096": {"GROUP_M": 16}}
    first = tune_hopper._arguments(8, (16, 24), 16, 4, torch.Generator().manual_seed(0))
    assert [t.shape for t in tune_hopper._definition("hopper_forward", first)] == [(8, 16), (8, 24)]
    (dx,) = tune_hopper._definition("hopper_backward_input", first.exact())
    assert (dx.shape, dx.dtype) == ((8, 16), torch.float64)
