"""The hybrid adapter under the import path of the user guide."""

from artemis.config import HybridAdapterConfig
from artemis.hybrid import add_hybrid_adapter_to_model, load_hybrid_adapter

__all__ = ["HybridAdapterConfig", "add_hybrid_adapter_to_model", "load_hybrid_adapter"]
