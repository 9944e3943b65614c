"""What serves all projections of a group at once, where a GPU has kernels for it; see ``Passes``."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ._cast import beside as triton_beside
from ._config import device_facts

__all__ = ["beside", "joint_input", "joint_outputs"]


@cache
def _hopper(device: torch.device) -> ModuleType | None:
    if device_facts(device).arch != "sm90":
        return None
    from . import hopper_joint

    return hopper_joint


def joint_outputs(x: Tensor, *rest: object) -> list[Tensor] | None:
    """As ``hopper_joint.joint_outputs``, or None."""
    hopper = _hopper(x.device)
    return None if hopper is None else hopper.joint_outputs(x, *rest)


def joint_input(dys: list[Tensor], *rest: object) -> Tensor | None:
    """As ``hopper_joint.joint_input``, or None."""
    hopper = _hopper(dys[0].device)
    return None if hopper is None else hopper.joint_input(dys, *rest)


def beside(tensors: list[Tensor], dim: int) -> Tensor:
    """As ``torch.cat``."""
    return torch.cat(tensors, dim) if _hopper(tensors[0].device) is None else triton_beside(tensors, dim)
