"""Fused Triton kernels for low-rank fine-tuning."""

from .adapter_files import load_adapter, save_adapter
from .config import LoRAConfig
from .functional import lora_linear
from .inject import inject
from .layers import FusedLoRALinear
from .merge import eject, merge, unmerge
from .methods import METHODS
from .peft_bridge import from_peft
from .report import Report, report

__all__ = [
    "METHODS",
    "FusedLoRALinear",
    "LoRAConfig",
    "Report",
    "eject",
    "from_peft",
    "inject",
    "load_adapter",
    "lora_linear",
    "merge",
    "report",
    "save_adapter",
    "unmerge",
]

__version__ = "0.1.0"
