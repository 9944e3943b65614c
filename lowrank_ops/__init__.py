"""Fused Triton kernels for low-rank fine-tuning."""

from . import gelora, lori, salor, salr
from .adapter_files import load_adapter, save_adapter
from .bitmap_weight import BitmapWeight
from .config import LoRAConfig
from .dense import dense_lora_linear
from .denselora_config import DenseLoRAConfig
from .flat_parameter import flat_parameter
from .functional import lora_linear
from .gelora_config import GeLoRAConfig
from .group import lora_linear_group
from .inject import inject
from .layer_dense import FusedDenseLoRALinear
from .layer_masked import FusedMaskedLoRALinear
from .layer_pruned import FusedPrunedLinear
from .layers import FusedLoRALinear
from .lori_config import LoRIConfig
from .masked import masked_lora_linear
from .merge import eject, merge, unmerge
from .merge_adapters import MergedAdapter, merge_adapters
from .methods import METHODS
from .peft_bridge import from_peft
from .pruned import pruned_linear
from .report import Report, report
from .salor_config import SALORConfig
from .salr_config import SALRConfig
from .sparse_mask import SparseMask

__all__ = [
    "METHODS",
    "BitmapWeight",
    "DenseLoRAConfig",
    "FusedDenseLoRALinear",
    "FusedLoRALinear",
    "FusedMaskedLoRALinear",
    "FusedPrunedLinear",
    "GeLoRAConfig",
    "LoRAConfig",
    "LoRIConfig",
    "MergedAdapter",
    "Report",
    "SALORConfig",
    "SALRConfig",
    "SparseMask",
    "dense_lora_linear",
    "eject",
    "flat_parameter",
    "from_peft",
    "gelora",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "lori",
    "masked_lora_linear",
    "merge",
    "merge_adapters",
    "pruned_linear",
    "report",
    "salor",
    "salr",
    "save_adapter",
    "unmerge",
]

__version__ = "0.1.0"
