"""DenseLoRA: a dense core in each layer, between an encoder and a decoder that all layers of a type share."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..denselora_config import DenseLoRAConfig
from .base import Adapter, Factors, adapter_dtype, parameter

__all__ = ["DenseLoRA", "SharedPair"]


class DenseLoRA(Adapter):
    """y = base(x) + scale · g(D M g(E x)), with g the exact GELU, or nothing: then ΔW = scale · D M E.

    The encoder E (R, K) starts uniform in ±1/√K and the core M (R, R) in ±1/√R, from torch's generator; the
    decoder D (N, R) starts at zero. E and D belong to a ``SharedPair``, which the layers of one type hold.

    Args:
        config: the options.
        weight: the frozen base weight, (N, K).
        pair: what other layers share with this one; a pair of its own if None.
        place: number of this layer among those that share the pair.
    """

    name, paper = "denselora", "https://arxiv.org/abs/2505.23808"
    config_class = DenseLoRAConfig

    def __init__(
        self, config: DenseLoRAConfig, weight: Tensor, pair: "SharedPair | None" = None, place: int = 0
    ) -> None:
        super().__init__(config, weight)
        self.activation, self.place = config.activation, place
        self.pair = SharedPair(config, weight) if pair is None else pair
        options = {"dtype": adapter_dtype(weight.dtype), "device": weight.device}
        self.core = nn.Parameter(torch.empty(config.r, config.r, **options))
        nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))

    @classmethod
    def build(cls, config: DenseLoRAConfig, weights: Mapping[str, Tensor]) -> dict[str, Adapter]:
        """Return the adapters of all layers, by name, with one pair a projection type.

        The pair lies on the device of the first layer of its type.

        Raises:
            ValueError: the type of a layer is not known, or layers of one type differ in shape or dtype.
        """
        layers: dict[str, list[str]] = {}
        for name in weights:
            layers.setdefault(config.projection(name), []).append(name)
        for projection, names in layers.items():
            _check_alike(type(config).__name__, projection, {name: weights[name] for name in names})
        adapters = {}
        for names in layers.values():
            pair = SharedPair(config, weights[names[0]], len(names))
            for place, name in enumerate(names):
                adapters[name] = cls(config, weights[name], pair, place)
        return {name: adapters[name] for name in weights}

    @property
    def encoder(self) -> Tensor:
        """E, (R, K); the same Parameter in all layers of the type."""
        return self.pair.encoder

    @property
    def decoder(self) -> Tensor:
        """D, (N, R); the same Parameter in all layers of the type."""
        return self.pair.decoder

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return encoder, core and decoder for a forward pass on ``device``, differentiable.

        A pair that lies elsewhere, as where a model is spread over devices, is copied there at each call, and
        its gradient back.
        """
        pair = self._modules["pair"]
        encoder, decoder = pair.use("encoder", self.place), pair.use("decoder", self.place)
        if encoder.device != device:
            encoder, decoder = encoder.to(device), decoder.to(device)
        return encoder, parameter(self, "core"), decoder

    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the linear update; a = E, b = D M.

        Raises:
            ValueError: there is an activation.
        """
        if self.activation is not None:
            raise ValueError(
                f"factors: update must be linear in x to have factors, got activation {self.activation!r}"
            )
        encoder, core, decoder = self.tensors(weight.device)
        return Factors(encoder, decoder @ core, self.scale)

    def file_tensors(self) -> dict[str, Tensor]:
        named = {"encoder": self.encoder, "core": self.core, "decoder": self.decoder}
        return {name: tensor.detach() for name, tensor in named.items()}

    @classmethod
    def check_file(
        cls, op: str, config: DenseLoRAConfig, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        first: dict[tuple[str, str], str] = {}
        for layer, named in tensors.items():
            projection = config.projection(layer)
            for name in ("encoder", "decoder"):
                if name not in named:
                    continue  # as the layer itself will say
                owner = first.setdefault((projection, name), layer)
                expected = tensors[owner][name]
                if named[name] is not expected and not torch.equal(named[name], expected):
                    raise ValueError(
                        f"{op}: {name} of {layer!r} must be that of {owner!r}, as both are of type "
                        f"{projection!r}, got another"
                    )


class SharedPair(nn.Module):
    """Encoder (R, K) and decoder (N, R) of one projection type, which ``count`` layers use.

    A module, and not two parameters in many modules, so that whatever makes new parameters, as ``to_empty``
    or ``load_state_dict(assign=True)``, makes one for all layers.

    Autograd would add the ``count`` gradients of a parameter to each other, one after the other, in its
    dtype. Here the layers of a forward pass each get an alias, and the node behind the aliases sums what
    arrives at them, once a backward pass and in float32.

    Memory: a backward pass keeps the gradients of all layers until that sum, count · R · (N + K) numbers,
    which is what the gradients of LoRA's factors take.
    """

    def __init__(self, config: DenseLoRAConfig, weight: Tensor, count: int = 1) -> None:
        super().__init__()
        (N, K), R = weight.shape, config.r
        options = {"dtype": adapter_dtype(weight.dtype), "device": weight.device}
        self.encoder = nn.Parameter(torch.empty(R, K, **options))
        self.decoder = nn.Parameter(torch.zeros(N, R, **options))
        self.count = count
        self._aliases: dict[str, _Aliases] = {}
        if K > 0:
            nn.init.kaiming_uniform_(self.encoder, a=math.sqrt(5))

    def use(self, name: str, place: int) -> Tensor:
        """Return "encoder" or "decoder" as the layer at ``place`` among those that share it is to use it.

        That is the parameter itself while a compiler traces, which sees the sum and fuses it.
        """
        shared = parameter(self, name)
        if (
            self.count == 1
            or not (torch.is_grad_enabled() and shared.requires_grad)
            # what is no parameter stands in for one, as in functional_call and DataParallel
            or type(shared) is not nn.Parameter
            or torch.compiler.is_compiling()
        ):
            return shared
        aliases = self._aliases.get(name)
        if aliases is None or not aliases.fit(shared):
            aliases = self._aliases[name] = _Aliases(shared, self.count)
        return aliases.tensors[place]

    def __getstate__(self) -> dict[str, Any]:
        # they belong to a graph, and no copy does
        return {**self.__dict__, "_aliases": {}}


class _Aliases:
    """One alias of a parameter for each of its uses, until a backward pass or a change of the parameter."""

    def __init__(self, shared: nn.Parameter, count: int) -> None:
        self._shared, self._version, self._place = shared, shared._version, shared.data_ptr()
        # emptied by the backward pass; not self, which would be a circle through the graph
        self._open = [True]
        self.tensors = _FanOut.apply(shared, count, self._open)

    def fit(self, shared: nn.Parameter) -> bool:
        """Whether the aliases are of ``shared`` as it is now."""
        return (
            bool(self._open)
            and self._shared is shared
            and self._version == shared._version
            and self._place == shared.data_ptr()
            and self.tensors[0].dtype == shared.dtype
            and self.tensors[0].device == shared.device
        )


class _FanOut(torch.autograd.Function):
    """``count`` aliases of a tensor; its gradient is the sum of theirs, in one reduction."""

    @staticmethod
    def forward(ctx, shared: Tensor, count: int, is_open: list[bool]) -> tuple[Tensor, ...]:
        ctx.is_open = is_open
        ctx.set_materialize_grads(False)
        return shared.expand(count, *shared.shape).unbind()

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        ctx.is_open.clear()
        given = [grad for grad in grads if grad is not None]
        if len(given) < 2:
            return (given or [None])[0], None, None
        # a reduction sums 16-bit numbers in float32 and rounds once
        return torch.stack(given).sum(0), None, None


def _check_alike(op: str, projection: str, weights: Mapping[str, Tensor]) -> None:
    (first, weight), *others = weights.items()
    expected = tuple(weight.shape), adapter_dtype(weight.dtype)
    for name, other in others:
        actual = tuple(other.shape), adapter_dtype(other.dtype)
        if actual != expected:
            shapes = [f"{shape} in {dtype}" for shape, dtype in (expected, actual)]
            raise ValueError(
                f"{op}: targets of type {projection!r} must have one shape and dtype, got {first!r} of "
                f"{shapes[0]} and {name!r} of {shapes[1]}; tell them apart with projections"
            )
