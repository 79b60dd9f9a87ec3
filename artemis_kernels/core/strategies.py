"""Which strategies an operation has for a call: what may be chosen, be it by costs or by a table.

A strategy is listed here where it can run; which one a call takes is decided in an operation's
`usual` (by costs) or by a measured table (`core.tables`). `chip` is None for the eager path on a
CPU.
"""

from typing import NamedTuple

import torch

from . import tiling
from .base import MOST_DIRECT_ROWS, MOST_SUMMED
from .device import INTERPRETER, Chip, multiplies_int8
from .frozen import MOST_ROWS
from .packed_passes import FORMATS, has_bf16_rows
from .quantized import QuantizedWeight
from .tiling import Shape

TENSOR = "tensor"
#: `frozen_linear` has a word for what is frozen: strategies and their times depend on it.
FROZEN = "frozen_linear:"
DTYPES = ("float64", "float32", "float16", "bfloat16")
_BITS = {"int8": ("auto", 8, 16), "fp8": ("auto", 8, 16), "int4": ("auto", 16)}
#: What the weight of a `Case` may be: a tensor, or a format and what it is multiplied in.
WEIGHTS = (TENSOR, *(f"{format}:{bits}" for format in FORMATS for bits in _BITS[format]))

#: The end of the word of a weight that makes logits, which no table has measured.
LOGITS_OF = ":logits"


class Case(NamedTuple):
    """What a choice may depend on. A bottleneck alone has no `in_features`, a product no width.

    `rows` is a power of two and stands for all rows above half of it; `dtype` is the computing
    one's name; `weight` one of `WEIGHTS`.
    """

    op: str
    rows: int
    in_features: int
    out_features: int
    width: int
    dtype: str
    weight: str = TENSOR
    trains: bool = False
    drops: bool = False

    @property
    def key(self) -> str:
        """The name of this case in a table."""
        words = " ".join(map(str, self[:7]))
        return words + " training" * self.trains + " dropout" * self.drops

    @classmethod
    def of(cls, key: str) -> "Case":
        """The case of a key; raises ValueError for any other text."""
        op, *rest = key.split(" ")
        if len(rest) < 6 or op not in OPERATIONS or rest[5] not in WEIGHTS:
            raise ValueError(key)
        sizes, (dtype, weight), flags = map(int, rest[:4]), rest[4:6], rest[6:]
        case = cls(op, *sizes, dtype, weight, "training" in flags, "dropout" in flags)
        if dtype not in DTYPES or case.key != key:
            raise ValueError(key)
        if min(case[1:5]) < 0 or case.rows < 1 or case.rows & (case.rows - 1):
            raise ValueError(key)
        return case

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def format(self) -> str:
        """Of the weight: `tensor`, or a packed weight's."""
        return self.weight.partition(":")[0]

    @property
    def bits(self) -> str:
        """What a packed weight asks to be multiplied in: `auto`, `8`, `16`."""
        return self.weight.partition(":")[2]


def named(dtype: torch.dtype) -> str:
    """The word of `Case.dtype`."""
    return str(dtype).removeprefix("torch.")


def weight_of(weight: torch.Tensor | QuantizedWeight | None) -> str:
    """The word of `Case.weight` for an operation's weight."""
    if not isinstance(weight, QuantizedWeight):
        return TENSOR
    logits = LOGITS_OF if weight.makes_logits else ""
    return f"{weight.format}:{weight.activation_bits}{logits}"


def candidates(case: Case, chip: Chip | None) -> tuple[str, ...]:
    """Every strategy that can run `case` on a chip, or in this process where that is None."""
    names = known(case, chip)
    return names if chip is not None else tuple(n for n in names if _has_passes(case, n))


def known(case: Case, chip: Chip | None) -> tuple[str, ...]:
    """Every strategy that a table may name; on a CPU, whatever is compiled in this process."""
    return OPERATIONS[case.op](case, chip)


def _has_passes(case: Case, name: str) -> bool:
    """Whether the passes that a strategy of a CPU cannot do without are there for `case`."""
    if name.startswith("one_call"):
        groups_fit = case.format != "int4" or case.in_features % 64 == 0
        return groups_fit and has_bf16_rows()
    if name.endswith(("_copy", "_direct")) and case.rows > MOST_DIRECT_ROWS:
        return has_bf16_rows()
    return True


def _lora_linear(case: Case, chip: Chip | None) -> tuple[str, ...]:
    if chip is None:
        return tuple("addmm" + suffix for suffix in _cpu_products(case))
    if case.format == TENSOR:
        one_pass = not case.drops and case.width <= tiling.MAX_ONE_PASS_RANK
        return ("one_pass",) * one_pass + ("split", "vendor")
    found = []
    for how, vendor in gpu_products(case, chip):
        found += [f"vendor_{how}"] if vendor else [f"split_{how}"]
        found += ["vendor_dense"] if how == "dense" else []
    return tuple(found)


def _adapter_linear(case: Case, chip: Chip | None) -> tuple[str, ...]:
    if chip is None:
        return tuple(f + suffix for suffix in _cpu_products(case) for f in ("folded", "plain"))
    if case.format == TENSOR:
        return ("folded", "folded_vendor", "plain")
    found = []
    for how, vendor in gpu_products(case, chip):
        end = f"_vendor_{how}" if vendor else f"_{how}"
        found += [f"folded{end}", f"plain{end}"]
        found += ["folded_vendor_dense"] if how == "dense" else []
    return tuple(found)


def _bottleneck_adapter(case: Case, chip: Chip | None) -> tuple[str, ...]:
    if chip is None:
        return ("addmm",)
    fits = case.width <= tiling.max_row_block_width(chip)
    one_read = case.trains and case.width <= tiling.MAX_ONE_READ_RANK
    return ("row_block",) * fits + ("two_launch",) + ("two_launch_one_read",) * one_read


def _quantized_linear(case: Case, chip: Chip | None) -> tuple[str, ...]:
    if case.format == TENSOR:
        return ()
    if chip is None:
        return tuple("product" + suffix for suffix in _cpu_products(case))
    return tuple(
        f"product_vendor_{how}" if vendor else f"product_{how}"
        for how, vendor in gpu_products(case, chip)
    )


def _frozen_linear(case: Case, chip: Chip | None) -> tuple[str, ...]:
    if chip is None:
        ends = _cpu_products(case)
        fits = case.dtype == "bfloat16" and case.rows <= MOST_ROWS[case.format]
        in_one = [f"one_call{end}" for end in ends if end in ("", "_weight_only") and fits]
        return (*in_one, *(f"products{end}" for end in ends))
    if case.op == FROZEN + "plain":
        return ("product",) if case.format == TENSOR else _quantized_linear(case, chip)
    found = _lora_linear(case, chip)
    return found if case.op == FROZEN + "lora" else tuple(n for n in found if n != "one_pass")


OPERATIONS = {
    "lora_linear": _lora_linear,
    "adapter_linear": _adapter_linear,
    "bottleneck_adapter": _bottleneck_adapter,
    "quantized_linear": _quantized_linear,
    **{FROZEN + kind: _frozen_linear for kind in ("lora", "folded", "plain")},
}


def _cpu_products(case: Case) -> tuple[str, ...]:
    """Ends of names that say how a packed weight is multiplied; one empty end for a tensor.

    `_weight_only` reads a packed weight as it is for few rows and copies it for many; the two
    others of that name do one of them whatever the rows.
    """
    if case.format == TENSOR:
        return ("",)
    if case.bits == "8" and case.format == "fp8":
        return ("_fp8",)
    sums = case.format != "int8" or max(case.in_features, case.out_features) <= MOST_SUMMED
    if case.bits == "8" and sums:
        return ("_int8",)
    found = ["_weight_only"]
    most = tiling.FEW_ROWS if case.dtype == "bfloat16" else MOST_DIRECT_ROWS
    if case.rows <= most:
        found += ["_weight_only_copy", "_weight_only_direct"]
    if case.format == "int8" and case.bits == "auto" and sums and multiplies_int8():
        found.append("_int8")
    return tuple(found)


def gpu_products(case: Case, chip: Chip) -> tuple[tuple[str, bool], ...]:
    """`(how, by the vendor)` of every way to multiply by a packed weight on a chip."""
    native = not why_no_eight_bits(case.format, max(case.in_features, case.out_features), chip)
    shape = Shape(case.rows, case.out_features, case.in_features, dtype=case.torch_dtype)
    vendor = vendor_multiplies(case.format, shape, chip)
    eight = ((case.format, False), (case.format, True))[: 1 + vendor] if native else ()
    if case.bits == "8" and native:
        return eight
    by_weight = (("weight_only", False), ("dense", False))
    return by_weight if case.bits == "16" else (*by_weight, *eight)


def why_no_eight_bits(format: str, longest: int, chip: Chip) -> str:
    """Why `chip` cannot multiply 8-bit activations by such a weight; nothing if it can."""
    if format == "int4":
        return "products of 8-bit activations need 8-bit weights, not int4"
    if format == "int8" and longest > MOST_SUMMED:
        return f"int32 may not hold sums over {longest:,} products"
    if chip.name == INTERPRETER or chip.backend == "hip" and format == "int8":
        return ""
    if format == "int8":
        return "" if chip.generation >= 80 else f"{chip.name} has no int8 tensor cores for it"
    if chip.generation >= 89 or chip.name == "gfx950":
        return ""
    return f"{chip.name} has no e4m3 tensor cores"


def vendor_multiplies(format: str, shape: Shape, chip: Chip) -> bool:
    """Whether torch has the 8-bit product of y [m, n] = x [m, k] Wᵀ on a chip.

    It asks for more than 16 rows, sides that 16 divides and, of e4m3 with scales by row, y in
    bfloat16.
    """
    if chip.name == INTERPRETER or chip.backend == "hip" or shape.m <= 16:
        return False
    if shape.k % 16 or shape.n % 16:
        return False
    return format == "int8" or shape.dtype == torch.bfloat16
