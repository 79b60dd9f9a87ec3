"""LoRA to and from the files that PEFT writes, and that servers such as vLLM read."""

from .adopt import Adopted, adopt
from .export import FORMS, ExportReport, export_adapter
from .files import holds_lora, read_files

__all__ = [
    "FORMS",
    "Adopted",
    "ExportReport",
    "adopt",
    "export_adapter",
    "holds_lora",
    "read_files",
]
