"""Hybrid adapters for Hugging Face models: LoRA on some layers, bottlenecks on the others."""

from .allocation import ModuleAllocation, RankAllocation, set_dynamic_rank_allocation
from .automatic import RankChoice, choose_ranks
from .config import HybridAdapterConfig
from .errors import AdapterError
from .fusing import FusionReport, fuse_model, unfuse_model
from .hybrid import add_hybrid_adapter_to_model, load_hybrid_adapter, load_peft_adapter
from .importance import analyze_layer_importance
from .interchange import ExportReport, export_adapter
from .merging import MergeReport
from .orthogonality import orthogonality_penalty
from .plots import plot_importance
from .quantization import (
    LayerReport,
    QuantizationReport,
    load_quantized,
    quantize_adapter_model,
    save_quantized,
)
from .saving.adapter_file import AdapterFile, read_adapter
from .version import __version__

__all__ = [
    "AdapterError",
    "AdapterFile",
    "ExportReport",
    "FusionReport",
    "HybridAdapterConfig",
    "LayerReport",
    "MergeReport",
    "ModuleAllocation",
    "QuantizationReport",
    "RankAllocation",
    "RankChoice",
    "__version__",
    "add_hybrid_adapter_to_model",
    "analyze_layer_importance",
    "choose_ranks",
    "export_adapter",
    "fuse_model",
    "load_hybrid_adapter",
    "load_peft_adapter",
    "load_quantized",
    "orthogonality_penalty",
    "plot_importance",
    "quantize_adapter_model",
    "read_adapter",
    "save_quantized",
    "set_dynamic_rank_allocation",
    "unfuse_model",
]
