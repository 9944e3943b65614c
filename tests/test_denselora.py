"""DenseLoRA in models: which layers share an encoder and a decoder, and how the shared pair learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_stack import BLOCKS, RANK, Stack, assert_close, gradients, inputs, make_config, make_stack, taken
from tiny_models import assert_untouched, fingerprint, stir, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_ops as lo

SHARED = [f"{name}.{half}" for name in ("q_proj", "up_proj", "down_proj") for half in ("encoder", "decoder")]


def shared_pair(model, name):
    return {
        "q_proj": model.layers[0].q_proj,
        "up_proj": model.layers[0].mlp.up_proj,
        "down_proj": model.layers[0].mlp.down_proj,
    }[name].adapter.pair


def unshared(model):
    """Return a copy of ``model`` in which every layer has a pair of its own."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, lo.FusedDenseLoRALinear):
            layer.adapter.pair = copy.deepcopy(layer.adapter.pair)
            layer.adapter.pair.count, layer.adapter.place = 1, 0
    return model


LLAMA_3_8B = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024)}
LLAMA_3_8B |= {"up_proj": (4096, 14336), "down_proj": (14336, 4096), "o_proj": (4096, 4096)}
LLAMA_2_7B = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096))
LLAMA_2_7B |= {"up_proj": (4096, 11008), "down_proj": (11008, 4096)}
COUNTS = [(LLAMA_3_8B, 16, 925_696), (LLAMA_3_8B, 32, 1_933_312), (LLAMA_3_8B, 64, 4_194_304)]
COUNTS += [(LLAMA_2_7B, 16, 917_504), (LLAMA_2_7B, 64, 4_161_536)]


@pytest.mark.parametrize(("shapes", "rank", "expected"), COUNTS, ids=[str(case[2]) for case in COUNTS])
def test_counts_are_those_of_the_paper_on_meta(shapes, rank, expected):
    options = {"bias": False, "device": "meta", "dtype": torch.bfloat16}
    model = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(*shape, **options) for name, shape in shapes.items()})
        for _ in range(32)
    )
    report = lo.report(lo.inject(model, lo.DenseLoRAConfig(r=rank)))
    assert report.trainable == expected
    assert report.shared == expected - 32 * 5 * rank**2
    assert report.layers == 160
    assert f"{expected:,} of " in str(report)
    assert f", {report.shared:,} of them shared\n" in str(report)


def test_a_model_with_grouped_queries_has_a_pair_a_type():
    model = lo.inject(tiny_llama(), lo.DenseLoRAConfig(r=RANK))
    shapes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "up_proj": (32, 48)}
    shapes["down_proj"] = (48, 32)
    expected = RANK * sum(map(sum, shapes.values())) + 2 * len(shapes) * RANK**2
    assert lo.report(model).trainable == expected
    first, second = (layer.self_attn.k_proj.adapter for layer in model.model.layers)
    assert first.encoder is second.encoder
    assert first.encoder.shape == (RANK, 32)
    assert first.decoder.shape == (16, RANK)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear


def test_a_fresh_model_computes_what_its_base_does_and_only_the_decoder_learns():
    torch.manual_seed(0)
    base = Stack(dtype=torch.float64)
    model = lo.inject(copy.deepcopy(base), make_config(lora_dropout=0.3)).train()
    x = inputs()
    y = model(x)
    assert torch.equal(y, base(x))
    y.square().sum().backward()
    for name, grad in taken(model).items():
        assert bool(grad.abs().max() > 0) == name.endswith("decoder")


def test_the_encoder_and_the_core_start_uniform_within_their_bounds():
    torch.manual_seed(0)
    adapter = lo.FusedDenseLoRALinear.from_linear(nn.Linear(1024, 8), lo.DenseLoRAConfig(r=64)).adapter
    for parameter, bound in ((adapter.encoder, 1 / 32), (adapter.core, 1 / 8)):
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std().item() / (bound / 3**0.5) - 1) < 0.05


def test_a_layer_computes_the_formula_of_the_paper():
    layer = stir(lo.FusedDenseLoRALinear.from_linear(nn.Linear(6, 7).double(), make_config()))
    x, adapter = inputs(), layer.adapter
    update = F.gelu(F.gelu(x @ adapter.encoder.T) @ adapter.core.T @ adapter.decoder.T)
    torch.testing.assert_close(layer(x), layer.base(x) + 2 * update)
    # the exact GELU is never below -0.17
    assert (layer(x) - layer.base(x)).min() >= -0.17 * 2


class Bert(nn.Module):
    """Two blocks of names as in BERT: three layers called ``dense``, of different shapes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            for name, shape in (("attention", (6, 6)), ("intermediate", (6, 8)), ("output", (8, 6))):
                child = nn.Module()
                child.dense = nn.Linear(*shape)
                block.add_module(name, child)
            self.layer.append(block)


REFUSED = {
    "targets of type 'dense' must have one shape and dtype, got 'layer.0.attention.dense' of "
    r"\(6, 6\) in torch.float32 and 'layer.0.intermediate.dense' of \(8, 6\)": {},
    "projection type of 'layer.0.output.dense' must be one of attention.dense, intermediate.dense, "
    "got 'dense'": {"projections": ["intermediate.dense", "attention.dense"]},
}


@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=["shapes", "unknown"])
def test_what_cannot_be_shared_is_refused_before_anything_changes(message, options):
    model = Bert()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        lo.inject(model, lo.DenseLoRAConfig(r=RANK, target_modules="all-linear", **options))
    assert_untouched(before, model)


def test_projections_tell_layers_of_one_name_apart():
    names = ["attention.dense", "intermediate.dense", "output.dense", "dense"]
    model = lo.inject(Bert(), lo.DenseLoRAConfig(r=RANK, target_modules="all-linear", projections=names))
    first, second = model.layer
    for name in ("attention", "intermediate", "output"):
        assert first.get_submodule(name).dense.adapter.pair is second.get_submodule(name).dense.adapter.pair
    assert first.attention.dense.adapter.pair is not first.output.dense.adapter.pair


CONFIGS = {
    "activation must be \"gelu\" or None, got 'relu'": {"activation": "relu"},
    "projections must be a list of strings, got str": {"projections": "q_proj"},
    "projections must hold strings, got int": {"projections": [1]},
    "projections must hold module names, got ''": {"projections": [""]},
    "r must be in 1..512, got 0": {"r": 0},
}


@pytest.mark.parametrize(("message", "options"), CONFIGS.items(), ids=CONFIGS)
def test_a_bad_option_gets_one_sentence(message, options):
    with pytest.raises((TypeError, ValueError), match=f"^DenseLoRAConfig: {message}$"):
        lo.DenseLoRAConfig(**options)


def test_the_gradient_of_a_shared_parameter_is_the_sum_over_its_layers():
    model = make_stack()
    shared, own = gradients(model), gradients(unshared(model))
    for name, grad in shared.items():
        prefix, _, half = name.partition(".adapter.pair.")
        parts = [own[f"layers.{i}{prefix[8:]}.adapter.pair.{half}"] for i in range(BLOCKS)] if half else []
        torch.testing.assert_close(grad, torch.stack(parts).sum(0) if parts else own[name])
    assert sum(".pair." in name for name in shared) == len(SHARED)


class Additions(TorchDispatchMode):
    """Counts sums and additions of tensors of the given shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.counts = shapes, {"add": 0, "stack": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        shape = args[0][0].shape if name == "stack" else getattr(args[0] if args else None, "shape", None)
        if name in self.counts and tuple(shape) in self.shapes:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_backward_pass_writes_each_shared_gradient_once():
    model = make_stack(torch.float32)
    arrived = {name: [] for name in SHARED}
    for name in SHARED:
        projection, _, half = name.partition(".")
        parameter = getattr(shared_pair(model, projection), half)
        parameter.register_post_accumulate_grad_hook(lambda p, seen=arrived[name]: seen.append(p.grad.dtype))
    y = model(inputs(torch.float32)).square().sum()
    # biases are (6,), cores (3, 3): the shapes of the shared parameters, and of nothing else
    with Additions({(3, 6), (3, 8), (6, 3), (8, 3)}) as additions:
        y.backward()
    assert arrived == {name: [torch.float32] for name in SHARED}
    assert additions.counts == {"add": 0, "stack": len(SHARED)}


def test_sixteen_bit_gradients_are_summed_in_float32_and_rounded_once():
    pair = lo.inject(Stack(), make_config()).layers[0].q_proj.adapter.pair.bfloat16()
    parts = torch.randn(BLOCKS, *pair.encoder.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    uses = [pair.use("encoder", place) for place in range(BLOCKS)]
    sum((use * part).sum() for use, part in zip(uses, parts, strict=True)).backward()
    assert torch.equal(pair.encoder.grad, parts.double().sum(0).bfloat16())


def test_a_graph_that_has_run_is_not_built_on():
    # its nodes may belong to another stream than that of the next pass, as where a CUDA graph is captured
    pair = shared_pair(make_stack(), "q_proj")
    first = pair.use("encoder", 1)
    assert pair.use("encoder", 1) is first
    first.sum().backward()
    assert pair.use("encoder", 1) is not first


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(reentrant, dropout):
    model = make_stack(lora_dropout=dropout).train()
    expected = gradients(model)
    model.reentrant = reentrant
    # the second time, aliases of the first are left over
    for _ in range(2):
        assert_close(gradients(model), expected)


def test_two_micro_batches_are_as_one_batch():
    model = make_stack()
    halves = [inputs(seed=1), inputs(seed=2)]
    expected = gradients(model, torch.cat(halves))
    for x in halves:
        model(x).square().sum().backward()
    assert_close(taken(model), expected)
    losses = [model(x).square().sum() for x in halves]
    for loss in losses:
        loss.backward()
    assert_close(taken(model), expected)
    sum(model(x).square().sum() for x in halves).backward()
    assert_close(taken(model), expected)


def test_layers_that_are_used_twice_or_not_at_all_count_as_often():
    model = make_stack()
    model.layers[2] = model.layers[0]
    own = unshared(model)
    shared, single = gradients(model), gradients(own)
    parts = [single[f"layers.{i}.q_proj.adapter.pair.encoder"] for i in (0, 1, 3)]
    torch.testing.assert_close(shared["layers.0.q_proj.adapter.pair.encoder"], torch.stack(parts).sum(0))
    # one block alone, without the others
    model.layers[1](inputs()).square().sum().backward()
    own.layers[1](inputs()).square().sum().backward()
    grad = model.layers[1].q_proj.adapter.encoder.grad
    torch.testing.assert_close(grad, own.layers[1].q_proj.adapter.encoder.grad)


def test_training_moves_what_every_layer_sees():
    model, own = make_stack(), make_stack()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, own)]
    own.reentrant = True  # gradients by another way
    for _ in range(3):
        for one, optimizer in zip((model, own), optimizers, strict=True):
            one(inputs()).square().sum().backward()
            one(inputs())  # has no backward pass, and the parameters change after it
            optimizer.step()
            optimizer.zero_grad()
    own.reentrant = None
    assert_close(dict(model.named_parameters()), dict(own.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), own(inputs()))


def test_evaluation_between_the_passes_of_a_step_does_no_harm():
    model = make_stack()
    expected = gradients(model)
    loss = model(inputs()).square().sum()
    model.eval()(inputs(seed=4))  # with gradients, and never used
    with torch.no_grad():
        model(inputs(seed=4))
    with torch.inference_mode():
        model(inputs(seed=4))
    loss.backward()
    assert_close(taken(model), expected)


def test_a_data_parallel_reducer_sees_each_shared_gradient_once(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_stack()
        expected = gradients(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for model.reentrant in (None, False, None):
            wrapped(inputs()).square().sum().backward()
            assert_close(taken(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_has_the_same_gradients():
    model = make_stack()
    expected = gradients(model)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())
    y.square().sum().backward()
    assert_close(taken(model), expected)


def test_functional_calls_and_meta_devices_get_plain_tensors():
    model = make_stack()
    expected = gradients(model)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (inputs(),), tie_weights=True).square().sum()

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    loss(leaves).backward()
    assert_close({name: leaf.grad for name, leaf in leaves.items()}, expected)
    encoder, _, decoder = model.layers[0].q_proj.adapter.tensors(torch.device("meta"))
    assert (encoder.device.type, decoder.device.type) == ("meta", "meta")


@pytest.mark.gpu
def test_a_captured_step_sums_what_an_eager_one_sums():
    model, x = make_stack(torch.float32).cuda(), inputs(torch.float32).detach().cuda()
    expected = gradients(model, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    graph.replay()
    captured = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(captured[name], grad) for name, grad in expected.items())
