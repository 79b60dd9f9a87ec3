"""Which modules repay training: scores from a few batches, before the first step."""

from .analyze import analyze_layer_importance
from .scores import METHODS

__all__ = ["METHODS", "analyze_layer_importance"]
