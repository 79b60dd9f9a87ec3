"""Hybrid adapters for Hugging Face models: LoRA on some layers, bottlenecks on the others."""

from .adapter_file import AdapterFile, read_adapter
from .config import HybridAdapterConfig
from .errors import AdapterError
from .hybrid import add_hybrid_adapter_to_model, load_hybrid_adapter
from .merging import MergeReport
from .orthogonality import orthogonality_penalty
from .version import __version__

__all__ = [
    "AdapterError",
    "AdapterFile",
    "HybridAdapterConfig",
    "MergeReport",
    "__version__",
    "add_hybrid_adapter_to_model",
    "load_hybrid_adapter",
    "orthogonality_penalty",
    "read_adapter",
]
