"""What the fused layers of every method have in common: the frozen base, merging, state, and checks."""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bitmap_weight import BitmapWeight
from .config import MethodConfig
from .methods import METHODS, Adapter, Factors
from .methods.base import parameter

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self  # comes with torch

__all__ = ["FusedLinear"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FusedLinear(nn.Module):
    """A frozen linear layer and the adapter beside it; the base class of the layers of every method.

    ``base`` is the linear layer itself, ``adapter`` holds the trained parameters, ``config`` what the user
    chose. ``impl`` ("auto", "triton" or "reference") and ``dropout_p`` may be set at any time. Dropout acts
    in training mode only.

    While merged, the forward pass is the base layer alone, in training mode too: no dropout, and the adapter
    gets no gradient. ``state_dict`` always describes the unmerged layer, merged or not, so that it loads into
    a fresh one. ``load_state_dict`` loads it into a merged layer too, and merges it again.

    A subclass says which ``methods`` it serves, and computes ``_update_forward``.
    """

    methods: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Linear, adapter: Adapter, config: MethodConfig) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.config = config
        self.dropout_p = config.lora_dropout
        self.impl = "auto"
        # whether another module holds base.weight too: merging must then not write into it
        self.shares_weight = False
        # fields of the adapter file that no option of ours stands for, as the base model's name
        self.peft_fields: dict[str, Any] = {}
        # the weight before merging; in a tuple, or nn.Module would register a Parameter
        self._original: tuple[Tensor] | None = None
        # where load_state_dict collects its errors, while it loads into a merged layer
        self._load_errors: list[str] | None = None
        self.register_state_dict_post_hook(_save_original_weight)
        self.register_load_state_dict_post_hook(_merge_again)
        self.train(base.training)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, config: MethodConfig, *, name: str = "") -> Self:
        """Put an adapter beside ``linear``, which is frozen and kept, not copied.

        Args:
            linear: a plain ``nn.Linear`` of float16, bfloat16, float32 or float64, on any device, "meta" too.
            config: the options, of a method that this class serves. The bias of ``linear`` trains unless
                ``config.bias`` is "none".
            name: the layer's name in its model, for methods whose layers depend on it.

        Returns:
            A layer that computes what ``linear`` computes, until it is trained. The adapter is on the device
            of ``linear``, in its dtype, or in float32 if that is 16-bit.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or ``config`` not a config of such a method.
        """
        check_config("from_linear", config, cls.methods)
        check_linear("from_linear", "linear", linear)
        layer = cls.build(config, {name: linear})[name]
        linear.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(config.bias != "none")
        return layer

    @classmethod
    def build(cls, config: MethodConfig, linears: Mapping[str, nn.Linear]) -> dict[str, Self]:
        """Return the layers of a model by name; changes nothing about the linears."""
        adapters = METHODS[config.method].build(config, {n: m.weight for n, m in linears.items()})
        return {name: cls(linear, adapters[name], config) for name, linear in linears.items()}

    @classmethod
    def build_for_file(
        cls,
        config: MethodConfig,
        linears: Mapping[str, nn.Linear],
        tensors: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Self]:
        """As :meth:`build`, for layers that ``prepare_load`` fills next: ``tensors`` of each, by its name."""
        return cls.build(config, linears)

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what an adapter file of a method that PEFT lacks holds of this layer, by name."""
        return self.adapter.file_tensors()

    def prepare_load(self, op: str, name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """See ``Adapter.prepare_load``; ``name`` is the layer's."""
        return self.adapter.prepare_load(op, name, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., N) for x (..., K), in the dtype of x."""
        base = self._modules["base"]
        own = base._parameters
        if "weight" in own and "bias" in own:
            w, bias = own["weight"], own["bias"]
        else:
            w, bias = parameter(base, "weight"), parameter(base, "bias")
        if self._original is not None:
            return F.linear(x, w, bias)
        return self._update_forward(x, w, bias, self.dropout_p if self.training else 0.0)

    def _update_forward(self, x: Tensor, w: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
        """Return y of the unmerged layer."""
        raise NotImplementedError(f"{type(self).__name__}._update_forward must return y")

    def plain(self) -> nn.Linear:
        """Return the layer without its adapter: ``base``, which holds the update if merged."""
        return self.base

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update."""
        return self._original is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, *, name: str = "weight") -> None:
        """Put the update into the base weight: W + scale · B A in float32, or float64, rounded once.

        A merged layer is left alone. The original weight moves to host memory, N·K numbers, until ``unmerge``
        or ``eject``; where another module shares the weight, it stays in place and the layer gets its own.

        Args:
            name: what the error calls the weight.

        Raises:
            ValueError: the merged weight would not be finite in its dtype; the layer is as before.
        """
        if self.merged:
            return
        weight = self.base.weight
        merged = merged_weight(weight, self.adapter.factors(weight), name)
        if self.shares_weight:
            self._original = (weight,)
            self.base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        else:
            self._original = (weight.data if weight.is_meta else weight.data.cpu(),)
            weight.data = merged

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit. An unmerged layer is left alone."""
        if self._original is None:
            return
        (original,) = self._original
        if isinstance(original, nn.Parameter):
            self.base.weight = original
        else:
            weight = self.base.weight
            weight.data = original.to(device=weight.device, dtype=weight.dtype)
        self._original = None

    @property
    def weight(self) -> Tensor:
        """The base weight, (N, K); holds the update only while merged."""
        return self.base.weight

    @property
    def compressed(self) -> BitmapWeight | None:
        """The base weight in compressed form, where the layer holds it so."""
        return None

    @property
    def bias(self) -> Tensor | None:
        """The base bias, (N,), or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """K."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base.out_features

    def extra_repr(self) -> str:
        adapter = self.adapter
        return (
            f"method={adapter.name}, rank={adapter.rank}, scale={adapter.scale:g}, "
            f"dropout={self.dropout_p:g}, impl={self.impl}, merged={self.merged}"
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        # base and adapter are loaded next, and _merge_again runs after them
        self._load_errors = args[-1] if self.merged else None
        self.unmerge()
        super()._load_from_state_dict(*args)


def merged_weight(weight: Tensor, factors: Factors, name: str) -> Tensor:
    """Return weight + scale · b a in the dtype of ``weight``, rounded once; raise if it is not finite."""
    a, b, scale = factors
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # the in-place form keeps its dtype under autocast
    merged = weight.detach().to(dtype, copy=True).addmm_(b.to(dtype), a.to(dtype), alpha=scale)
    merged = merged.to(weight.dtype)
    if not weight.is_meta and not merged.isfinite().all():
        count = (~merged.isfinite()).sum().item()
        raise ValueError(
            f"merge: {name} must be finite in {weight.dtype} once merged, got {count} values that are not"
        )
    return merged


def _save_original_weight(
    layer: FusedLinear, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    key = f"{prefix}base.weight"
    if layer._original is not None and key in state:
        state[key] = layer._original[0].detach()


def _merge_again(layer: FusedLinear, incompatible_keys: Any) -> None:
    errors, layer._load_errors = layer._load_errors, None
    if errors is None:
        return
    try:
        layer.merge()
    except ValueError as error:
        # an exception here would leave the modules that come after unloaded
        errors.append(f"{error}; the layer is now unmerged")


def check_config(op: str, config: object, methods: Collection[str] = tuple(METHODS)) -> None:
    """Raise unless ``config`` is a config of one of ``methods``."""
    if not isinstance(config, MethodConfig):
        known = ", ".join(METHODS[method].config_class.__name__ for method in methods)
        raise TypeError(f"{op}: config must be one of {known}, got {type(config).__name__}")
    if config.method not in methods:
        known = ", ".join(methods)
        raise ValueError(f"{op}: config must be of a known method, {known}, got {config.method!r}")


def check_linear(op: str, name: str, module: object) -> None:
    """Raise unless ``module`` is a plain ``nn.Linear`` whose forward pass a fused layer can stand for."""
    if type(module) is not nn.Linear:
        raise TypeError(f"{op}: {name} must be a plain nn.Linear, got {type(module).__name__}")
    # a subclass of Tensor (quantised, sharded) computes something else than its numbers say
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in _DTYPES:
        kind = type(module.weight).__name__
        raise TypeError(
            f"{op}: {name} must have a weight of float16, bfloat16, float32 or float64, "
            f"got {kind} of {module.weight.dtype}"
        )
    check_unhooked(op, name, module)


def check_unhooked(op: str, name: str, module: nn.Module) -> None:
    """Raise if something hangs on the forward or backward pass of ``module``, which we replace."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(hook, "offload", False) for hook in _accelerate_hooks(module)):
        raise ValueError(
            f"{op}: {name} must hold its weight, got one that accelerate offloads; "
            "load the model with a device_map without cpu and disk"
        )
    # what is left of accelerate's hooks moves inputs to the weight's device, as the hook of the block around
    # it does too; only a layer with an entry of its own in device_map, as a head, has no such block
    has_own_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if has_own_forward or any(getattr(module, kind) for kind in kinds):
        raise ValueError(
            f"{op}: {name} must have no hooks and no forward of its own, got some; "
            "add them to the fused layer, which does not call what it replaces"
        )


def _accelerate_hooks(module: nn.Module) -> list[object]:
    found, stack = [], [getattr(module, "_hf_hook", None)]
    while stack:
        hook = stack.pop()
        # a SequentialHook holds others
        stack.extend(getattr(hook, "hooks", ()))
        found.append(hook)
    return found
