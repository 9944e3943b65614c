"""Fused Triton kernels for low-rank fine-tuning."""

from . import gelora
from .adapter_files import load_adapter, save_adapter
from .config import LoRAConfig
from .functional import lora_linear
from .gelora_config import GeLoRAConfig
from .group import lora_linear_group
from .inject import inject
from .layers import FusedLoRALinear
from .merge import eject, merge, unmerge
from .methods import METHODS
from .peft_bridge import from_peft
from .report import Report, report

__all__ = [
    "METHODS",
    "FusedLoRALinear",
    "GeLoRAConfig",
    "LoRAConfig",
    "Report",
    "eject",
    "from_peft",
    "gelora",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "merge",
    "report",
    "save_adapter",
    "unmerge",
]

__version__ = "0.1.0"
