"""The hybrid adapter under the import path of the user guide."""

from artemis.allocation import set_dynamic_rank_allocation
from artemis.config import HybridAdapterConfig
from artemis.hybrid import add_hybrid_adapter_to_model, load_hybrid_adapter
from artemis.importance import analyze_layer_importance

__all__ = [
    "HybridAdapterConfig",
    "add_hybrid_adapter_to_model",
    "analyze_layer_importance",
    "load_hybrid_adapter",
    "set_dynamic_rank_allocation",
]
