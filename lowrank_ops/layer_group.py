"""Sibling layers that their parent calls on one tensor: the first call computes them all."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .group import lora_linear_group

__all__ = ["LayerGroup"]


class _Tensors(NamedTuple):
    """What one layer brings to a joint computation."""

    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float

    def fits(self, other: "_Tensors") -> bool:
        return self.a.dtype == other.a.dtype and self.b.dtype == other.b.dtype


class _Pending(NamedTuple):
    """What a computation left for the siblings: by ``id`` of a layer its y, its parameters, their state."""

    x: weakref.ref[Tensor]
    version: int
    situation: tuple
    results: dict[int, tuple]


class LayerGroup:
    """Fused layers that share their input, as q, k, v of one attention: ``FusedLoRALinear.group`` of each.

    When the first of them is called with a tensor, it computes all, with ``lora_linear_group``; the others,
    called with that very tensor in the same situation (version, grad mode, autocast, dropout, parameters),
    take their results. Anything else computes alone: a layer that is merged or has hooks, one whose dtype,
    device, ``impl`` or dropout differs from that of the first, another tensor, one of inference mode, a
    checkpointed region of a compiled graph. With dropout, the layers of one computation share one mask.

    A result that its layer did not take is dropped when x is freed, or when a layer is called with something
    else, and the group then stops: its layers compute alone from the next forward pass on. ``layer.group =
    None`` takes a layer out, and of all if it is the first. The group holds its layers weakly and is no
    module: it is in no ``state_dict``. A copy or a pickle of the layers has a group of its own.

    Args:
        layers: fused layers, in the order in which a parent calls them on one tensor; become its members.
        active: False for a group that has stopped.
    """

    def __init__(self, layers: Sequence[nn.Module] = (), active: bool = True) -> None:
        self.active = active
        # whether the last forward pass computed jointly: what checkpointing repeats of it must do the same
        self._acted = active
        self._members: dict[int, weakref.ref[nn.Module]] = {}
        # by thread: two threads may run one model
        self._pending: dict[int, _Pending] = {}
        # while a compiler traces: x, its situation, and the layers and results that are left
        self._traced: tuple[Tensor, tuple, list[tuple[nn.Module, Tensor]]] | None = None
        for place, layer in enumerate(layers):
            layer.group, layer.group_place = self, place
            self.join(layer)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copied layer joins the copied group by itself: see FusedLoRALinear.__setstate__
        return LayerGroup, ((), self.active)

    def join(self, layer: nn.Module) -> None:
        """Take ``layer`` in, unless its place is taken, as where ``copy.copy`` made ``layer``."""
        place = layer.group_place
        if place not in self._members or self._members[place]() is None:
            self._members[place] = weakref.ref(layer)
            self._members = dict(sorted(self._members.items()))

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return y of ``layer``, one of the group, for ``x`` (..., K), or None where it computes alone."""
        if torch.compiler.is_compiling():
            return self._traced_output(layer, x) if self.active and not _is_in_region() else None
        thread = get_ident()
        pending = self._pending.get(thread)
        if pending is not None:
            y = _take(pending, layer, x)
            if y is None:
                self._stop(thread)
            else:
                if not pending.results:
                    del self._pending[thread]
                return y
        members = self._layers()
        if layer is not members[0] or type(x) is not Tensor or x.is_inference():
            return None
        if self._traced is not None:
            # a graph ended before all its results were taken
            self._stop(thread)
        if torch._C._current_graph_task_id() == -1:
            self._acted = self.active
        if not self._acted:
            return None
        situation = _situation(layer, x)
        together = self._together(members, x, situation)
        if len(together) < 2:
            return None
        (_, y), *rest = _outputs(together, x, situation)
        results = {id(member): (result, *_state(member)) for member, result in rest}
        forget = self._forgetter(thread)
        self._pending[thread] = _Pending(weakref.ref(x, forget), x._version, situation, results)
        return y

    def _traced_output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return what ``output`` returns, in terms that a compiler can follow into one graph."""
        left, self._traced = self._traced, None
        situation = _situation(layer, x)
        if left is None:
            members = self._layers()
            together = self._together(members, x, situation) if layer is members[0] else []
            if len(together) < 2:
                return None
            left = x, situation, list(_outputs(together, x, situation))
        for i, (member, y) in enumerate(left[2]):
            if member is layer and left[0] is x and left[1] == situation:
                rest = left[2][:i] + left[2][i + 1 :]
                if rest:
                    self._traced = x, situation, rest
                return y
        self.active = False
        return None

    def _layers(self) -> list[nn.Module]:
        members = [ref() for ref in self._members.values()]
        return [member for member in members if member is not None]

    def _together(
        self, members: list[nn.Module], x: Tensor, situation: tuple
    ) -> list[tuple[nn.Module, _Tensors]]:
        """Return the first of ``members`` and those that fit to it, with their tensors; or nothing."""
        own = self._tensors(members[0], x, situation)
        if own is None:
            return []
        others = [(member, self._tensors(member, x, situation)) for member in members[1:]]
        fitting = [(member, t) for member, t in others if t is not None and t.fits(own)]
        return [(members[0], own), *fitting]

    def _tensors(self, member: nn.Module, x: Tensor, situation: tuple) -> _Tensors | None:
        """Return the tensors of ``member`` if it can share a computation for x, or None."""
        dropout_p, impl, dtype, _, _ = situation
        if member._original is not None or member.group is not self or member.impl != impl:
            return None
        if dropout_p != (member.dropout_p if member.training else 0.0):
            return None
        if "forward" in member.__dict__ or member._forward_hooks or member._forward_pre_hooks:
            return None
        if member._backward_hooks or member._backward_pre_hooks:
            return None
        base, adapter = member._modules["base"], member._modules["adapter"]
        if "b" in adapter._modules:
            # it exists at the entries of a mask alone
            return None
        w = base._parameters.get("weight")
        # a weight that is missing, flat or of another type is one that FSDP or a parametrization took away
        if type(w) is not nn.Parameter or w.dim() != 2 or x.dim() < 1 or w.shape[1] != x.shape[-1]:
            return None
        if w.device != x.device or (w.dtype != x.dtype and dtype is None):
            return None
        return _Tensors(w, base._parameters.get("bias"), *adapter.factors(w))

    def _stop(self, thread: int) -> None:
        self.active, self._traced = False, None
        self._pending.pop(thread, None)

    def _forgetter(self, thread: int) -> Callable[[weakref.ref[Tensor]], None]:
        group = weakref.ref(self)

        def forget(x: weakref.ref[Tensor]) -> None:
            owner = group()
            pending = None if owner is None else owner._pending.get(thread)
            if pending is not None and pending.x is x:
                owner._stop(thread)

        return forget


def _situation(layer: nn.Module, x: Tensor) -> tuple:
    """Return all that a result depends on beside x and the parameters.

    Options of the layer, autocast, grad mode, and what saved tensors go through: a checkpointed region must
    find in its own results all that it will repeat.
    """
    kind = "cuda" if x.is_cuda else x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else None
    compiles = torch.compiler.is_compiling()
    hooks = None if compiles else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return layer.dropout_p if layer.training else 0.0, layer.impl, dtype, torch.is_grad_enabled(), hooks


def _state(layer: nn.Module) -> tuple[list[Tensor], list[int | bool | None]]:
    """Return the tensors that a layer's factors come from, and what tells whether one was changed."""
    base, adapter = layer._modules["base"], layer._modules["adapter"]
    every = (*base._parameters.values(), *adapter._parameters.values(), *adapter._buffers.values())
    tensors = [t for t in every if t is not None]
    # what inference mode made has no versions
    versions = [None if t.is_inference() else t._version for t in tensors]
    return tensors, [*map(id, tensors), *versions, *[t.requires_grad for t in tensors]]


def _outputs(
    together: list[tuple[nn.Module, _Tensors]], x: Tensor, situation: tuple
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield every layer with its y."""
    ws, biases, a_list, b_list, scales = zip(*[t for _, t in together], strict=True)
    dropout_p, impl, *_ = situation
    ys = lora_linear_group(x, ws, a_list, b_list, biases, scales=scales, dropout_p=dropout_p, impl=impl)
    return zip([layer for layer, _ in together], ys, strict=True)


def _take(pending: _Pending, layer: nn.Module, x: Tensor) -> Tensor | None:
    if pending.x() is not x or pending.version != x._version or id(layer) not in pending.results:
        return None
    y, _, state = pending.results.pop(id(layer))
    # whoever differentiated one result has used up the graph of all
    if pending.situation != _situation(layer, x) or getattr(y.grad_fn, "spent", False):
        return None
    return y if _state(layer)[1] == state else None


def _is_in_region() -> bool:
    """Whether a compiler traces the inside of a checkpointed region, which may change nothing outside."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (AttributeError, ImportError):
        return True


# run by the compiler itself, while it traces, and its result taken for a constant
_is_in_region._dynamo_marked_constant = True
