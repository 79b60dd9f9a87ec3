"""A frozen base in 8 or 4 bits under the adapter: packing a model, its report, its file."""

from .load import load_quantized
from .quantize import quantize_adapter_model
from .report import LayerReport, QuantizationReport
from .store import save_quantized

__all__ = [
    "LayerReport",
    "QuantizationReport",
    "load_quantized",
    "quantize_adapter_model",
    "save_quantized",
]
