"""Quantization under the import path of the user guide."""

from artemis.quantization import load_quantized, quantize_adapter_model, save_quantized

__all__ = ["load_quantized", "quantize_adapter_model", "save_quantized"]
