"""All trained values of a model in one parameter, so that an optimizer's step is a few launches."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .inject import check_model, fused_layers, named_modules, unwrapped
from .methods.salor import SALOR

__all__ = ["flat_parameter"]

_OP = "flat_parameter"
# bytes: what a kernel may assume of a tensor that the allocator made, and a cache line
_ALIGNMENT = 128


def flat_parameter(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> nn.Parameter:
    """Make one flat parameter of all that trains, in place, for an optimizer to hold instead.

    An optimizer's step over hundreds of small tensors costs what the processor does for each of them. The
    parameters of the model become views of the flat one; at the end of every backward pass their gradients
    are added to its ``grad``, in one go, and their own are None. So any optimizer, ``clip_grad_norm_`` and
    gradient accumulation work as always, on this one parameter::

        flat = lo.flat_parameter(model)
        optimizer = torch.optim.AdamW([flat], lr=1e-4, fused=True)
        ...
        loss.backward()
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        optimizer.step()
        optimizer.zero_grad()  # the optimizer's: that of the model does not know ``flat``

    Names, ``state_dict``, ``load_state_dict`` and ``save_adapter`` of the model stay as they are. What an
    optimizer of single parameters does otherwise: there is one learning rate and one weight decay; one that
    takes a norm or a shape of each tensor, as Adafactor, LAMB or Muon, sees one vector; a parameter that got
    no gradient, while others did, counts as one whose gradient is zero; and autograd does not notice a step
    between a forward pass and its backward.

    Call it after the model has its final parameters, device and dtype: before the optimizer is made, before a
    CUDA graph is captured, after ``lori.sparsify`` or ``load_adapter`` into a plain model, which make other
    parameters; those are not part of ``flat``, and can be made flat by another call. A copy of the model
    (``copy.deepcopy``) has parameters of its own, which are not flat. ``DistributedDataParallel`` does not
    fit, before or after: average ``flat.grad`` over the processes instead, in one ``all_reduce``.

    Args:
        model: on one device, not "meta".
        parameters: which of its parameters to take, as one of ``salr.parameter_groups``; None takes all that
            require a gradient. They must share device and dtype.

    Returns:
        The flat parameter, 1-D: the values in the order of ``model.parameters()``, each tensor at the next
        multiple of 128 bytes, with zeros in between, which stay zero. It has the gradients so far, if any.

    Raises:
        ValueError: nothing requires a gradient, devices or dtypes differ, a parameter is flat already, not of
            this model, on "meta", or of a SALOR adapter that is still pruned, or the model is in
            DistributedDataParallel. TypeError: an argument or a parameter has the wrong type. All is then as
            before.
        RuntimeError: in a backward pass, if a parameter left ``flat``, as by ``model.to(...)``.

    Memory: from the end of a backward pass to ``zero_grad`` one gradient of the flat parameter; while it is
    made, the single ones too.
    """
    named = _trained(model, parameters)
    first = next(iter(named.values()))
    each = _ALIGNMENT // first.element_size()
    sizes = [size for p in named.values() for size in (p.numel(), -p.numel() % each)]
    grads = {2 * i: p.grad for i, p in enumerate(named.values()) if p.grad is not None}
    with torch.inference_mode(False), torch.no_grad():
        flat = nn.Parameter(torch.zeros(sum(sizes), dtype=first.dtype, device=first.device))
        owner = _Owner(flat, sizes)
        pieces, start = flat.detach().split(sizes)[::2], 0
        for i, ((name, p), piece) in enumerate(zip(named.items(), pieces, strict=True)):
            view = piece.view(p.shape)
            view.copy_(p)
            p.data, p.grad = view, None
            p.register_post_accumulate_grad_hook(_Hook(owner, 2 * i, start * p.element_size(), name))
            start += sizes[2 * i] + sizes[2 * i + 1]
        if grads:
            owner.add(grads)
    return flat


class _Owner:
    """The flat parameter, the sizes of its pieces (values, gap, values, ...), and open backward passes."""

    def __init__(self, flat: nn.Parameter, sizes: list[int]) -> None:
        self.flat, self.sizes = flat, sizes
        # by the engine's number of the pass; the engine holds each until the pass ends, well or not, so that
        # what a failed pass leaves behind is gone
        self.batches: WeakValueDictionary[int, _Batch] = WeakValueDictionary()

    @torch.no_grad()
    def add(self, grads: dict[int, Tensor]) -> None:
        """Add the gradients of some pieces, by place, to that of the flat parameter."""
        is_new = self.flat.grad is None
        if is_new:
            self.flat.grad = torch.zeros_like(self.flat)
        pieces = self.flat.grad.split(self.sizes)
        targets, values = [pieces[i] for i in grads], [g.reshape(-1) for g in grads.values()]
        if is_new:
            torch._foreach_copy_(targets, values)
        else:
            torch._foreach_add_(targets, values)


class _Batch:
    """The gradients that one backward pass has made so far."""

    def __init__(self, owner: _Owner) -> None:
        self.owner = owner
        self.grads: dict[int, Tensor] = {}

    def flush(self) -> None:
        self.owner.add(self.grads)


class _Hook:
    """Takes the gradient of one parameter as soon as it is there, to be added at the end of the pass."""

    __slots__ = ("name", "offset", "owner", "place")

    def __init__(self, owner: _Owner, place: int, offset: int, name: str) -> None:
        self.owner, self.place, self.offset, self.name = owner, place, offset, name

    def __call__(self, p: nn.Parameter) -> None:
        owner = self.owner
        if p.data_ptr() != owner.flat.data_ptr() + self.offset and p.numel():
            raise RuntimeError(
                f"{_OP}: parameter {self.name!r} must be the view of the flat parameter that it was, got one "
                "that was moved or replaced; call flat_parameter on a model that has its device and dtype"
            )
        task = torch._C._current_graph_task_id()
        batch = owner.batches.get(task)
        if batch is None:
            batch = owner.batches[task] = _Batch(owner)
            Variable._execution_engine.queue_callback(batch.flush)
        batch.grads[self.place] = p.grad
        p.grad = None


def _trained(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    """Return the parameters to take by name, in the order of the model, or raise."""
    check_model(_OP, model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{_OP}: model must not be in DistributedDataParallel, got one that is; "
            "average the gradient of the flat parameter by all_reduce instead"
        )
    own = {}
    for prefix, module in named_modules(unwrapped(model)):
        for name, p in module._parameters.items():
            if p is not None:
                own.setdefault(id(p), (f"{prefix}.{name}".lstrip("."), p))
    if parameters is None:
        found = {name: p for name, p in own.values() if p.requires_grad}
    else:
        wanted = _identities(parameters)
        if not wanted <= own.keys():
            raise ValueError(f"{_OP}: parameters must be those of model, got one that it does not have")
        found = {name: p for key, (name, p) in own.items() if key in wanted}
    if not found:
        raise ValueError(f"{_OP}: model must have parameters that require a gradient, got none")
    _check_parameters(found)
    for name, layer in fused_layers(unwrapped(model)).items():
        # its schedule clears the optimizer's state of single parameters
        if isinstance(layer.adapter, SALOR) and any(p in set(found.values()) for p in layer.parameters()):
            raise ValueError(
                f"{_OP}: adapter of {name!r} must be in its compact form, got one that is still pruned; "
                "call finish() of its PruningSchedule first"
            )
    return found


def _identities(parameters: Iterable[nn.Parameter]) -> set[int]:
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        kind = type(parameters).__name__
        raise TypeError(f"{_OP}: parameters must be an iterable of parameters or None, got {kind}")
    return {id(p) for p in parameters}


def _check_parameters(parameters: dict[str, nn.Parameter]) -> None:
    (first_name, first), *_ = parameters.items()
    for name, p in parameters.items():
        if type(p) is not nn.Parameter:
            raise TypeError(f"{_OP}: {name!r} must be a plain nn.Parameter, got {type(p).__name__}")
        if not p.requires_grad:
            raise ValueError(f"{_OP}: {name!r} must require a gradient, got a frozen parameter")
        if p.is_meta:
            raise ValueError(f"{_OP}: {name!r} must hold numbers, got a parameter on meta")
        if any(isinstance(hook, _Hook) for hook in (p._post_accumulate_grad_hooks or {}).values()):
            raise ValueError(
                f"{_OP}: {name!r} must not be part of a flat parameter, got one that is; "
                "use what the first call returned"
            )
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"{_OP}: parameters must share dtype and device, got {first.dtype} on {first.device} for "
                f"{first_name!r}, {p.dtype} on {p.device} for {name!r}; call it for each with parameters=..."
            )
