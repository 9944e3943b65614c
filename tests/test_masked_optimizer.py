"""The benchmark of the optimizer's step runs on a CPU, and its three forms do the same."""

import json

import torch

from benchmarks import masked_optimizer


def test_the_optimizer_benchmark_times_every_form_on_the_same_values(tmp_path):
    sizes = ["--blocks", "1", "--rank", "4", "--shrink", "256", "--rounds", "2", "--sparsity", "0.5"]
    assert masked_optimizer.main(["--device", "cpu", *sizes, "--out", str(tmp_path), "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("masked_optimizer-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["environment"]["commit"] == "abc"
    assert data["tensors"] == 7
    assert data["values"]["dense"] == sum(N * R for N, R in masked_optimizer.shapes(1, 4, 256))
    # in the flat one each tensor begins at a multiple of 128 bytes
    assert data["values"]["compact"] < data["values"]["dense"]
    assert data["values"]["flat"] % 32 == 0
    assert set(data["ms"]["step"]) == set(data["ms"]["cycle"]) == set(masked_optimizer.FORMS)
    assert min(min(row.values()) for row in data["ms"].values()) > 0


def test_the_forms_of_the_optimizer_benchmark_take_the_same_step():
    values = [torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((8, 4), (5, 4))]
    masks = [v > 0 for v in values]
    forms = {name: masked_optimizer.Form(name, values, masks) for name in masked_optimizer.FORMS}
    for form in forms.values():
        form.cycle()
    for dense, compact, flat, mask in zip(*(form.parameters for form in forms.values()), masks, strict=True):
        assert torch.equal(dense[mask], compact)
        assert torch.equal(compact, flat)
