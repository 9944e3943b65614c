"""What every method provides: its parameters, their initialisation, and the factors of its update."""

from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MethodConfig

__all__ = ["Adapter", "Factors", "adapter_dtype", "parameter"]


class Factors(NamedTuple):
    """The update ΔW = scale · b a of one layer: a (R, K), b (N, R), scale dimensionless."""

    a: Tensor
    b: Tensor
    scale: float


class Adapter(nn.Module):
    """Parameters of one layer's update. A method is a subclass: ``__init__`` and ``factors``.

    Forward, merge, unmerge and files all follow from ``factors``, so that they cannot disagree.

    Args:
        config: the layer's own config, patterns already resolved.
        weight: the frozen base weight, (N, K); its shape, dtype and device are read, on "meta" too.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]]
    # whether a layer computes what the linear layer did until it is trained
    starts_as_base: ClassVar[bool] = True

    def __init__(self, config: MethodConfig, weight: Tensor) -> None:
        super().__init__()
        self.rank = config.r
        self.scale = config.scale

    @classmethod
    def build(cls, config: MethodConfig, weights: Mapping[str, Tensor]) -> dict[str, "Adapter"]:
        """Return the adapters of all layers of a model by name; a method that shares parameters overrides it.

        Args:
            config: of the model; patterns not resolved.
            weights: the frozen base weight, (N, K), of each layer.
        """
        return {name: cls(config.for_layer(name), weight) for name, weight in weights.items()}

    def factors(self, weight: Tensor) -> Factors:
        """Return the factors of the update, differentiable in every parameter.

        Args:
            weight: the frozen base weight, (N, K), for methods whose update depends on it.
        """
        raise NotImplementedError(f"{type(self).__name__}.factors must return Factors")

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what an adapter file of a method that PEFT lacks holds of this layer, by name."""
        return self.state_dict()

    @classmethod
    def check_file(cls, op: str, config: MethodConfig, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raise ValueError unless the ``tensors`` of a file, by layer and name, fit each other."""

    def prepare_load(self, op: str, layer: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Check ``tensors``, as :meth:`file_tensors` of another adapter gave them; return what copies them.

        What is returned cannot fail. A method whose files say more than values, as which entries exist,
        overrides this.

        Raises:
            ValueError: a name or a shape does not fit.
        """
        own = self.file_tensors()
        for name in sorted(own.keys() ^ tensors.keys()):
            what = "lacks" if name in own else "adds"
            raise ValueError(
                f"{op}: adapter must hold {sorted(own)} of {layer!r}, got one that {what} {name!r}"
            )
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                expected, actual = tuple(tensor.shape), tuple(tensors[name].shape)
                raise ValueError(f"{op}: {name} of {layer!r} must be {expected}, got {actual}")
        copies = [(tensor, tensors[name].to(tensor.device, tensor.dtype)) for name, tensor in own.items()]

        def copy() -> None:
            with torch.no_grad():
                for target, source in copies:
                    target.copy_(source)

        return copy


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return the dtype of an adapter beside a base of dtype ``base``: at least float32, as in PEFT."""
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return ``getattr(module, name)``, sooner where it is a parameter: for what every forward pass reads."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
