"""A model's own norms, gated MLPs and rotary embeddings as single operations."""

from .fuse import check_unfusable, fuse_model, is_fused, unfuse_model
from .report import FusionReport

__all__ = ["FusionReport", "check_unfusable", "fuse_model", "is_fused", "unfuse_model"]
