"""Find the linear layers that a config targets and put fused layers in their places."""

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from warnings import warn

import torch
from torch import nn

from .config import MethodConfig, pattern_key, selects
from .fused_linear import FusedLinear, check_config, check_linear
from .layer_group import LayerGroup
from .layer_masked import FusedMaskedLoRALinear
from .layer_types import LAYERS
from .layers import FusedLoRALinear
from .siblings import shared_inputs

__all__ = ["inject"]

# layers whose update may be computed with those of their siblings
_GROUPED = (FusedLoRALinear, FusedMaskedLoRALinear)
# what torch.compile, FSDP and checkpoint_wrapper put into the names of the modules inside them
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# classes whose forward pass, or whose fused kernel, reads the weights of these children and does not call
# them; by name, since a model's own code may carry a copy
_BYPASSED = {
    "BambaMixer": ("out_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DetrMHAttentionMap": ("k_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "Zamba2MambaMixer": ("out_proj",),
}


def inject(model: nn.Module, config: MethodConfig) -> nn.Module:
    """Put an adapter beside every linear layer that ``config`` targets, in place, and freeze the rest.

    A linear layer that the model holds under several names becomes one fused layer under all of them. Only
    the adapters train afterwards, and the biases that ``config.bias`` names. Layers that their parent calls
    on one tensor, as q, k and v of an attention, are linked, to be computed together: see
    ``FusedLoRALinear.group``.

    Args:
        model: a model that contains ``nn.Linear`` layers, on any devices, "meta" too.
        config: the options of the method.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a target matches nothing, the model has adapters already, or a target's forward pass is
            bypassed where it stands. TypeError: a target is not a plain ``nn.Linear``, or an argument is of
            the wrong type. The model, and torch's generators, are then as before.

    Memory: R·(N+K) numbers a layer, float32 beside a 16-bit base.
    """
    check_model("inject", model)
    check_config("inject", config)
    check_uninjected("inject", model)
    root, model = model, unwrapped(model)
    targets = find_targets("inject", model, config.target_modules)
    _warn_of_unused_patterns(config, targets)
    devices = {linear.weight.device for linear in targets.values()}
    # tensors that are made in inference mode could never train
    with torch.inference_mode(False), torch.no_grad(), generators_kept_on_failure(devices):
        layers = LAYERS[config.method].build(config, targets)
    install(model, {id(linear): layers[name] for name, linear in targets.items()})
    set_trainable(model, layers.values())
    return root


def fused_layers(model: nn.Module) -> dict[str, FusedLinear]:
    """Return the fused layers of ``model`` by name, each once."""
    return {name: module for name, module in named_modules(model) if isinstance(module, FusedLinear)}


def check_whole(op: str, layers: Mapping[str, FusedLinear]) -> None:
    """Raise if an adapter is a DTensor, of which a process has a part."""
    for name, layer in layers.items():
        for key, parameter in layer.adapter.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise ValueError(
                    f"{op}: adapter of {name!r} must be whole, got {key} sharded as in FSDP; "
                    "load the full state dict into a model that is not sharded"
                )


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once with its first name, less what wrappers put into it."""
    return ((_WRAPPERS.sub("", name), module) for name, module in model.named_modules())


def find_targets(op: str, model: nn.Module, targets: str | Collection[str]) -> dict[str, nn.Linear]:
    """Return the linear layers that ``targets`` selects, by first name, or raise; changes nothing."""
    modules = {name: module for name, module in named_modules(model) if name}
    if targets == "all-linear":
        head = output_embedding(model)
        found = {n: m for n, m in modules.items() if type(m) is nn.Linear and m is not head}
        if not found:
            kind = type(model).__name__
            advice = _name_unsupported(module for module in modules.values() if module is not head)
            raise ValueError(f"{op}: model must contain an nn.Linear, got a {kind} without one{advice}")
    else:
        # a target may use any name of a shared module; files use the first
        aliases = [(_WRAPPERS.sub("", n), m) for n, m in model.named_modules(remove_duplicate=False) if n]
        _check_all_match(op, targets, [name for name, _ in aliases])
        first = {id(module): name for name, module in modules.items()}
        found = {first[id(m)]: m for n, m in aliases if selects(targets, n)}
    for name, module in found.items():
        check_linear(op, f"target {name!r}", module)
    check_called(op, model, found)
    return found


def check_called(op: str, model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise where a parent reads a target's weight and skips the module, which would drop the adapter."""
    names = {id(module): name for name, module in targets.items()}
    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    for parent in model.modules():
        for child_name, child in parent.named_children():
            if id(child) not in names:
                continue
            name = names[id(child)]
            if has_fast_path and isinstance(parent, nn.TransformerEncoderLayer):
                raise ValueError(
                    f"{op}: target {name!r} must be called by its parent, got {type(parent).__name__}, whose "
                    "fast path skips it; call torch.backends.mha.set_fastpath_enabled(False) first"
                )
            if any(child_name in _BYPASSED.get(cls.__name__, ()) for cls in type(parent).__mro__):
                raise ValueError(
                    f"{op}: target {name!r} must be called by its parent, got {type(parent).__name__}, "
                    "which reads its weight instead; leave it out of target_modules"
                )


def install(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put fused layers in the places of the modules whose ``id`` is the key; note whose weight is tied.

    Layers that their parent calls on one tensor become a group.
    """
    note_shared_weights(model, [m for m in replacements.values() if isinstance(m, FusedLinear)])
    replace_modules(model, replacements)
    link_siblings(model)


def link_siblings(model: nn.Module) -> None:
    """Make a group of the fused layers of every parent in ``model`` whose source calls them on one tensor."""
    for parent in model.modules():
        fused = {n: m for n, m in parent.named_children() if type(m) in _GROUPED and m.group is None}
        if len(fused) < 2:
            continue
        for names in shared_inputs(type(parent).forward):
            layers = [fused[name] for name in names if name in fused]
            if len(layers) > 1:
                LayerGroup(layers)


def note_shared_weights(model: nn.Module, layers: Iterable[FusedLinear]) -> None:
    """Tell ``layers`` whether another module of ``model`` holds their base weight too."""
    holders = Counter(
        id(parameter) for module in model.modules() for parameter in set(module.parameters(recurse=False))
    )
    for layer in layers:
        # what a larger model said before still holds where ``model`` is a part of it
        layer.shares_weight = layer.shares_weight or holders[id(layer.base._parameters.get("weight"))] > 1


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace every module whose ``id`` is a key, under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and id(module) in replacements:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[id(module)])


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, where the model says which it is."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def check_model(op: str, model: object) -> None:
    """Raise unless ``model`` is a module that can hold fused layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    inner = unwrapped(model)
    if isinstance(inner, nn.Linear):
        raise TypeError(
            f"{op}: model must contain linear layers, got a bare {type(inner).__name__}; "
            "use FusedLoRALinear.from_linear"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def check_uninjected(op: str, model: nn.Module) -> None:
    """Raise if ``model`` has adapters, ours or PEFT's."""
    layers = fused_layers(model)
    if layers:
        raise ValueError(
            f"{op}: model must have no adapters, got {len(layers)} fused layers, "
            f"first {next(iter(layers))!r}; eject it first"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        # its reducer knows the parameters of its start only: adapters would differ between processes
        raise ValueError(
            f"{op}: model must not be in DistributedDataParallel yet, got one that is; wrap it afterwards"
        )
    for name, module in named_modules(model):
        if type(module).__module__.partition(".")[0] == "peft":
            kind = type(module).__name__
            raise ValueError(
                f"{op}: model must have no adapters, got PEFT's {kind} at {name!r}; use from_peft"
            )


def set_trainable(model: nn.Module, layers: Iterable[FusedLinear]) -> None:
    """Freeze ``model`` but for the adapters and the biases that their config names."""
    layers = list(layers)
    bias = layers[0].config.bias
    adapters = {id(parameter) for layer in layers for parameter in layer.adapter.parameters()}
    biases = {id(layer.bias) for layer in layers}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            every = bias == "all" and name.rpartition(".")[2] == "bias"
            parameter.requires_grad_(every or (bias == "lora_only" and id(parameter) in biases))


def _name_unsupported(modules: Iterable[nn.Module]) -> str:
    """Return a clause that names a linear layer of another kind, as a quantised one, if there is one."""
    for kind in map(type, modules):
        if kind.__name__ == "Conv1D" or "Linear" in kind.__name__:
            return f"; {kind.__name__} of {kind.__module__.partition('.')[0]} is not supported"
    return ""


def _check_all_match(op: str, targets: str | Collection[str], names: list[str]) -> None:
    for target in [targets] if isinstance(targets, str) else targets:
        if any(selects(target if isinstance(targets, str) else [target], name) for name in names):
            continue
        ends = sorted({name.rpartition(".")[2] for name in names})
        close = difflib.get_close_matches(target, ends, n=3) or difflib.get_close_matches(target, names, n=3)
        advice = f"; close names are {', '.join(close)}" if close else ""
        if isinstance(targets, str):
            advice = "; a string is a regular expression for the whole name, a list holds the ends of names"
        raise ValueError(f"{op}: target_modules must match modules of the model, got {target!r}{advice}")


def _warn_of_unused_patterns(config: MethodConfig, names: Collection[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, {})
        for key in pattern:
            if not any(pattern_key([key], name) for name in names):
                warn(f"inject: {field} has {key!r}, which matches no target and is ignored", stacklevel=3)


@contextmanager
def generators_kept_on_failure(devices: Collection[torch.device]) -> Iterator[None]:
    """Put torch's generators, that of the CPU and those of ``devices``, back where an exception passes."""
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        for device in devices:
            if device.type == "cuda":
                stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
        yield
        stack.pop_all()
