"""How to pack: the caller's options, checked."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AdapterError, listed

#: (bits, format of the user) -> format of the weight.
_FORMATS = {(8, "int"): "int8", (8, "fp8"): "fp8", (4, "int"): "int4"}
_ADAPTER_BITS = (32, 16, 8)
_GROUP_SIZES = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Options:
    """How weights and adapters are to be held, checked; `format` is a `QuantizedWeight`'s."""

    format: str
    group_size: int | None
    activation_bits: int | str
    adapter_bits: int
    include_head: bool
    calibrated: bool
    leave: tuple[str, ...]


def checked_options(
    bits, format, group_size, activation_bits, adapter_bits, include_head, calibrated, leave=()
) -> Options:
    """The options, or one `AdapterError` for the first that makes no sense."""
    if (bits, format) not in _FORMATS or isinstance(bits, bool):
        raise AdapterError(
            f"bits, format: got {bits!r}, {format!r}, allowed: 8 with 'int' or 'fp8', 4 with 'int'"
        )
    packed = _FORMATS[bits, format]
    if isinstance(adapter_bits, bool) or adapter_bits not in _ADAPTER_BITS:
        raise AdapterError(f"adapter_bits: got {adapter_bits!r}, allowed: 32, 16 or 8")
    if activation_bits not in ("auto", 8, 16) or (activation_bits == 8 and packed == "int4"):
        raise AdapterError(
            f"activation_bits: got {activation_bits!r}, allowed: 'auto' or 16, and 8 where weights"
            f" are int8 or fp8; these are {packed}"
        )
    if group_size is not None and (packed != "int4" or group_size not in _GROUP_SIZES):
        raise AdapterError(
            f"group_size: got {group_size!r}, allowed: with bits=4 one of {listed(_GROUP_SIZES)},"
            " else None"
        )
    if calibrated and packed != "int4":
        raise AdapterError(f"data: got some for {packed}, allowed: with bits=4, which it serves")
    if not isinstance(include_head, bool):
        raise AdapterError(f"include_head: got {include_head!r}, allowed: True or False")
    if isinstance(leave, str) or not isinstance(leave, Iterable):
        raise AdapterError(f"leave: got {leave!r}, allowed: a list of paths of modules")
    return Options(
        packed, group_size, activation_bits, adapter_bits, include_head, bool(calibrated),
        tuple(leave),
    )  # fmt: skip
