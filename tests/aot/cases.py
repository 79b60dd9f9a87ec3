"""The launches whose artefacts are kept under budget: every kernel, at shapes of a language model.

bf16 activations with fp32 adapters (the default of training), one case a kernel in fp32, one with
an odd reduction. Each case is `launch(chip)`, on meta tensors, with the configuration that the
chip would get.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from artemis_kernels.core import tiling, tuning
from artemis_kernels.core.device import Chip
from artemis_kernels.core.quantized import QuantizedWeight
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.bottleneck_adapter.kernels import row_block
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Dropout, Scale
from artemis_kernels.ops.low_rank.expand import expand, update
from artemis_kernels.ops.low_rank.expand_backward import expand_backward
from artemis_kernels.ops.low_rank.expand_persistent import expand_persistent
from artemis_kernels.ops.low_rank.one_pass import one_pass
from artemis_kernels.ops.low_rank.shrink import shrink
from artemis_kernels.ops.low_rank.shrink_backward import shrink_backward
from artemis_kernels.ops.low_rank.sum_parts import sum_parts
from artemis_kernels.ops.packed.eight_bit import eight_bit
from artemis_kernels.ops.packed.epilogue import Epilogue, finish
from artemis_kernels.ops.packed.round_rows import round_rows
from artemis_kernels.ops.packed.unpack import unpack
from artemis_kernels.ops.packed.weight_only import weight_only

BF16, FP32 = torch.bfloat16, torch.float32
FP8 = torch.float8_e4m3fn
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_FP8 = ("sm_90", "sm_100")
WITH_TMA = ("sm_90", "sm_100")


class Case(NamedTuple):
    """A named launch; `training`: its tiles suit the chip's widest tensor-core instruction.

    `eight_bit`: its main loop multiplies 8-bit numbers; `chips`: where it may run.
    """

    name: str
    launch: Callable[[Chip], object]
    training: bool = False
    fp32: bool = False
    chips: tuple[str, ...] = TARGETS
    eight_bit: bool = False


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dropout() -> Dropout:
    return Dropout(0.1, meta(1, dtype=torch.int64))


def _scale() -> Scale:
    return Scale(0.5, meta())


def _shrink(m, k, r, dtype=BF16, stage="linear", dropout=NO_DROPOUT):
    def launch(chip):
        masked = bool(dropout.p) and stage == "linear"
        config = tuning.config("shrink", Shape(m, k=k, r=r, dtype=dtype, masked=masked), chip)
        hidden = stage != "linear"
        shrink(
            meta(m, k, dtype=dtype), meta(r, k), config=config, stage=stage,
            activation="gelu" if hidden else "identity", dropout=dropout, with_h=hidden,
            z=meta(m, r) if stage == "backward" else None,
            bias=meta(r) if stage == "forward" else None,
        )  # fmt: skip

    return launch


def _expand(m, n, k, r, dtype=BF16, dropout=NO_DROPOUT, bias_low=None):
    def launch(chip):
        config = tuning.config("expand", Shape(m, n, k, r, dtype, bool(dropout.p)), chip)
        expand(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, r), meta(n, r), config=config,
            bias=meta(n, dtype=dtype), bias_low=bias_low, scale=_scale(), dropout=dropout,
        )  # fmt: skip

    return launch


def _expand_persistent(m, n, k, r, transposed=False):
    def launch(chip):
        config = tuning.config("expand", Shape(m, n, k, r, BF16), chip)
        weight = meta(k, n, dtype=BF16).t() if transposed else meta(n, k, dtype=BF16)
        expand_persistent(
            meta(m, k, dtype=BF16), weight, meta(m, r), meta(n, r), config=config,
            programs=chip.processors, bias=meta(n, dtype=BF16), scale=_scale(),
        )  # fmt: skip

    return launch


def _update(m, n, r, dtype=BF16, dropout=NO_DROPOUT):
    def launch(chip):
        config = tuning.config(
            "update", Shape(m, n, r=r, dtype=dtype, masked=bool(dropout.p)), chip
        )
        y = meta(m, n, dtype=dtype)
        update(
            y, meta(m, r), meta(n, r), config=config, dtype=dtype, scale=_scale(), dropout=dropout,
            out=y,
        )  # fmt: skip

    return launch


def _one_pass(m, n, k, r, dtype=BF16):
    def launch(chip):
        config = tuning.config("one_pass", Shape(m, n, k, r, dtype), chip)
        one_pass(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(r, k), meta(n, r), config=config,
            bias=meta(n, dtype=dtype), scale=_scale(),
        )  # fmt: skip

    return launch


def _expand_backward(m, n, r, dtype=BF16, stage="linear", dropout=NO_DROPOUT):
    def launch(chip):
        config = tuning.config("expand_backward", Shape(m, n, r=r, dtype=dtype), chip)
        expand_backward(
            meta(m, n, dtype=dtype), meta(n, r), meta(m, r), config=config, stage=stage,
            activation="identity" if stage == "linear" else "gelu", dropout=dropout,
            with_columns=True,
        )  # fmt: skip

    return launch


def _shrink_backward(m, k, r, dtype=BF16, dropout=NO_DROPOUT):
    def launch(chip):
        shape = Shape(m, k=k, r=r, dtype=dtype, masked=bool(dropout.p))
        config = tuning.config("shrink_backward", shape, chip)
        x = meta(m, k, dtype=dtype)
        shrink_backward(x, meta(m, r), config=config, dropout=dropout, with_columns=not dropout.p)

    return launch


def _row_block(m, k, r, stage, dtype=BF16):
    def launch(chip):
        width = min(r, tiling.max_row_block_width(chip))
        config = tuning.config("row_block", Shape(m, k=k, r=width, dtype=dtype), chip)
        x, down, up = meta(m, k, dtype=dtype), meta(width, k), meta(k, width)
        f, e = (down, up) if stage == "forward" else (up.t(), down.t())
        row_block(
            x, f, e, x, config=config, stage=stage, activation="gelu", scale=_scale(),
            dropout=_dropout(), z=meta(m, width), with_h=stage == "backward",
        )  # fmt: skip

    return launch


def _sum_parts(chip):
    sum_parts(meta(64, 4096, 16), meta(4096, 16), scale=_scale(), other=meta(4096, 16))


def _epilogue(m, n, r, **more):
    return Epilogue(meta(m, r), meta(n, r), meta(n, dtype=BF16), scale=_scale(), **more)


def _packed(n, k, format):
    if format != "int4":
        data = meta(n, k, dtype=torch.int8 if format == "int8" else FP8)
        return QuantizedWeight(data, meta(n), None, format, None)
    scale, offset = meta(n, k // 128, dtype=BF16), meta(n, k // 128, dtype=BF16)
    return QuantizedWeight(meta(n, k // 2, dtype=torch.uint8), scale, offset, format, 128)


def _weight_only(m, n, k, r, format):
    def launch(chip):
        name = "weight_only_4" if format == "int4" else "weight_only_8"
        config = tuning.config(name, Shape(m, n, k, r, BF16), chip)
        x = meta(m, k, dtype=BF16)
        weight_only(x, _packed(n, k, format), _epilogue(m, n, r), config=config)

    return launch


def _unpack(n, k, format):
    def launch(chip):
        config = tuning.config("unpack", Shape(1, n, k, dtype=BF16), chip)
        unpack(_packed(n, k, format), BF16, config=config)

    return launch


def _eight_bit(m, n, k, r, dtype, dropout=NO_DROPOUT, precise=False):
    def launch(chip):
        config = tuning.config("eight_bit", Shape(m, n, k, r, BF16, bool(dropout.p)), chip)
        more = {"row": meta(m), "column": meta(n), "dropout": dropout}
        if dtype == torch.int8:
            more |= {"xa": meta(m, 16, dtype=BF16), "wa": meta(n, 16, dtype=BF16)}
        eight_bit(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, n, dtype=BF16),
            _epilogue(m, n, r, **more), config=config, precise=precise,
        )  # fmt: skip

    return launch


def _round_rows(m, k, dtype):
    def launch(chip):
        config = tuning.config("round_rows", Shape(m, k, dtype=BF16), chip)
        round_rows(meta(m, k, dtype=BF16), dtype, meta(k), config=config)

    return launch


def _finish_product(m, n, r):
    def launch(chip):
        config = tuning.config("finish_product", Shape(m, n, r=r, dtype=BF16), chip)
        more = {"row": meta(m), "column": meta(n)}
        parts, y = meta(1, m, n, dtype=torch.int32), meta(m, n, dtype=BF16)
        finish(parts, y, _epilogue(m, n, r, **more), config=config)

    return launch


CASES = (
    Case("shrink rank 16", _shrink(8192, 4096, 16), training=True),
    Case("shrink rank 16 dropout", _shrink(8192, 4096, 16, dropout=_dropout())),
    Case("shrink rank 256", _shrink(8192, 4096, 256), training=True),
    Case("shrink forward width 64", _shrink(8192, 4096, 64, stage="forward", dropout=_dropout())),
    Case("shrink backward width 64", _shrink(8192, 4096, 64, stage="backward", dropout=_dropout())),
    Case("shrink few rows", _shrink(16, 4096, 16, stage="forward")),
    Case("shrink fp32", _shrink(8192, 4096, 16, FP32), fp32=True),
    Case("expand rank 16", _expand(8192, 4096, 4096, 16), training=True),
    Case("expand width 64", _expand(8192, 4096, 4096, 64, bias_low=meta(4096)), training=True),
    Case("expand rank 256", _expand(8192, 4096, 4096, 256, bias_low=meta(4096)), training=True),
    Case("expand dropout", _expand(8192, 4096, 4096, 16, dropout=_dropout()), training=True),
    Case("expand few rows", _expand(16, 4096, 4096, 16)),
    Case("expand odd", _expand(8192, 4096, 4097, 16)),
    Case("expand fp32", _expand(8192, 4096, 4096, 16, FP32), fp32=True),
    *(
        Case(name, _expand_persistent(8192, 4096, 4096, r, t), training=True, chips=WITH_TMA)
        for name, r, t in (
            ("expand_persistent rank 16", 16, False),
            ("expand_persistent width 64", 64, False),
            ("expand_persistent backward", 16, True),
        )
    ),
    Case("update rank 16", _update(8192, 4096, 16)),
    Case("update rank 64 dropout", _update(8192, 4096, 64, dropout=_dropout())),
    Case("update fp32", _update(8192, 4096, 16, FP32), fp32=True),
    Case("one_pass small out", _one_pass(8192, 1024, 4096, 16), training=True),
    Case("one_pass few rows", _one_pass(16, 4096, 4096, 64)),
    Case("one_pass fp32", _one_pass(8192, 1024, 4096, 16, FP32), fp32=True),
    Case("expand_backward rank 16", _expand_backward(8192, 4096, 16), training=True),
    Case(
        "expand_backward width 64",
        _expand_backward(8192, 4096, 64, stage="backward", dropout=_dropout()),
        training=True,
    ),
    Case("expand_backward fp32", _expand_backward(8192, 4096, 16, FP32), fp32=True),
    Case("shrink_backward rank 16", _shrink_backward(8192, 4096, 16), training=True),
    Case("shrink_backward dropout", _shrink_backward(8192, 4096, 16, dropout=_dropout())),
    Case("shrink_backward rank 256", _shrink_backward(8192, 4096, 256), training=True),
    Case("shrink_backward fp32", _shrink_backward(8192, 4096, 16, FP32), fp32=True),
    Case("row_block forward width 64", _row_block(16384, 2048, 64, "forward")),
    Case("row_block backward width 64", _row_block(16384, 2048, 64, "backward")),
    Case("row_block widest", _row_block(16384, 2048, 256, "forward")),
    Case("row_block fp32", _row_block(16384, 2048, 64, "forward", FP32), fp32=True),
    Case("sum_parts", _sum_parts),
    *(
        Case(f"weight_only {format} {m} rows", _weight_only(m, 4096, 4096, 16, format))
        for format in ("int8", "fp8", "int4")
        for m in (1, 64, 256)
    ),
    Case("unpack int8", _unpack(4096, 4096, "int8")),
    Case("unpack int4", _unpack(4096, 4096, "int4")),
    Case(
        "eight_bit int8",
        _eight_bit(8192, 4096, 4096, 16, torch.int8),
        training=True,
        eight_bit=True,
    ),
    Case("eight_bit int8 dropout", _eight_bit(8192, 4096, 4096, 16, torch.int8, _dropout())),
    Case(
        "eight_bit int8 width 64",
        _eight_bit(8192, 4096, 4096, 64, torch.int8),
        training=True,
        eight_bit=True,
    ),
    Case(
        "eight_bit fp8",
        _eight_bit(8192, 4096, 4096, 16, FP8),
        training=True,
        chips=WITH_FP8,
        eight_bit=True,
    ),
    Case(
        "eight_bit fp8 precise dropout",
        _eight_bit(8192, 4096, 4096, 16, FP8, _dropout(), precise=True),
        training=True,
        chips=WITH_FP8,
    ),  # fmt: skip
    Case("eight_bit odd", _eight_bit(8192, 4097, 4097, 16, torch.int8)),
    Case("round_rows int8", _round_rows(8192, 4096, torch.int8)),
    Case("round_rows fp8", _round_rows(8192, 4096, FP8), chips=WITH_FP8),
    Case("finish_product int32", _finish_product(8192, 4096, 16)),
)
