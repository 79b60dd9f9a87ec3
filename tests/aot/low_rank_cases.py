"""Cases of the kernels that LoRA and bottlenecks share, and of the bottleneck alone."""

from artemis_kernels.core import tiling, tuning
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.bottleneck_adapter.kernels import row_block
from artemis_kernels.ops.bottleneck_adapter.weight_gradients import sum_gradients, weight_gradients
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT
from artemis_kernels.ops.low_rank.expand import expand, update
from artemis_kernels.ops.low_rank.expand_backward import expand_backward
from artemis_kernels.ops.low_rank.expand_persistent import expand_persistent
from artemis_kernels.ops.low_rank.one_pass import one_pass
from artemis_kernels.ops.low_rank.shrink import shrink
from artemis_kernels.ops.low_rank.shrink_backward import shrink_backward
from artemis_kernels.ops.low_rank.sum_parts import sum_parts
from tests.aot.case import BF16, FP32, WITH_TMA, Case, drawn, meta, scaled


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


def _shrink_of_members(m, k, widths):
    def launch(chip):
        r = sum(widths)
        config = tuning.config("shrink", Shape(m, k=k, r=r, dtype=BF16), chip)
        shrink(
            meta(m, k, dtype=BF16), meta(r, k, dtype=BF16), config=config, stage="forward",
            activation="gelu", dropout=drawn(), with_h=True, bias=meta(r), widths=widths,
        )  # fmt: skip

    return launch


def _between(m, r, dtype=FP32):
    """Columns of one member in the matrix of a group."""
    return meta(m, 2 * r, dtype=dtype)[:, r:]


def _expand_of_member(m, n, k, r):
    def launch(chip):
        config = tuning.config("expand", Shape(m, n, k, r, BF16), chip)
        x, weight = meta(m, k, dtype=BF16), meta(n, k, dtype=BF16)
        expand(x, weight, _between(m, r, BF16), meta(n, r), config=config, scale=scaled())

    return launch


def _expand_backward_of_member(m, n, r, stage):
    def launch(chip):
        config = tuning.config("expand_backward", Shape(m, n, r=r, dtype=BF16), chip)
        expand_backward(
            meta(m, n, dtype=BF16), meta(n, r), _between(m, r), config=config, stage=stage,
            activation="identity" if stage == "linear" else "gelu",
            dropout=NO_DROPOUT if stage == "linear" else drawn(), with_columns=True,
            out=_between(m, r), scale=scaled(),
        )  # fmt: skip

    return launch


def _expand(m, n, k, r, dtype=BF16, dropout=NO_DROPOUT, bias_low=None):
    def launch(chip):
        config = tuning.config("expand", Shape(m, n, k, r, dtype, bool(dropout.p)), chip)
        expand(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, r), meta(n, r), config=config,
            bias=meta(n, dtype=dtype), bias_low=bias_low, scale=scaled(), dropout=dropout,
        )  # fmt: skip

    return launch


def _expand_persistent(m, n, k, r, transposed=False):
    def launch(chip):
        config = tuning.config("expand", Shape(m, n, k, r, BF16), chip)
        weight = meta(k, n, dtype=BF16).t() if transposed else meta(n, k, dtype=BF16)
        expand_persistent(
            meta(m, k, dtype=BF16), weight, meta(m, r), meta(n, r), config=config,
            programs=chip.processors, bias=meta(n, dtype=BF16), scale=scaled(),
        )  # fmt: skip

    return launch


def _update(m, n, r, dtype=BF16, dropout=NO_DROPOUT):
    def launch(chip):
        config = tuning.config(
            "update", Shape(m, n, r=r, dtype=dtype, masked=bool(dropout.p)), chip
        )
        y = meta(m, n, dtype=dtype)
        update(
            y, meta(m, r), meta(n, r), config=config, dtype=dtype, scale=scaled(), dropout=dropout,
            out=y,
        )  # fmt: skip

    return launch


def _one_pass(m, n, k, r, dtype=BF16):
    def launch(chip):
        config = tuning.config("one_pass", Shape(m, n, k, r, dtype), chip)
        one_pass(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(r, k), meta(n, r), config=config,
            bias=meta(n, dtype=dtype), scale=scaled(),
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
            x, f, e, x, config=config, stage=stage, activation="gelu", scale=scaled(),
            dropout=drawn(), z=meta(m, width), with_h=stage == "backward",
            hidden_dtype=FP32 if stage == "forward" else dtype,
        )  # fmt: skip

    return launch


def _weight_gradients(m, k, r, dtype=BF16, hidden_dtype=BF16):
    def launch(chip):
        config = tuning.config("weight_gradients", Shape(m, k=k, r=r, dtype=dtype), chip)
        x, dz, h = meta(m, k, dtype=dtype), meta(m, r, dtype=hidden_dtype), meta(m, r, dtype=dtype)
        weight_gradients(x, x, dz, h, config=config, with_sums=True)

    return launch


def _sum_gradients(chip):
    found = (meta(64, 4096), meta(4096, 64), meta(64), meta(4096))
    parts = meta(8, 2 * 64 * 4096 + 64 + 4096)
    sum_gradients(parts, *found, scale=scaled(), against=(meta(4096, 64), meta(4096)))


def _sum_parts(chip):
    sum_parts(meta(64, 4096, 16), meta(4096, 16), scale=scaled(), other=meta(4096, 16))


CASES = (
    Case("shrink rank 16", _shrink(8192, 4096, 16), training=True),
    Case("shrink rank 16 dropout", _shrink(8192, 4096, 16, dropout=drawn())),
    Case("shrink rank 65 dropout", _shrink(16384, 4096, 65, dropout=drawn())),
    Case("shrink rank 256", _shrink(8192, 4096, 256), training=True),
    Case("shrink forward width 64", _shrink(8192, 4096, 64, stage="forward", dropout=drawn())),
    Case("shrink backward width 64", _shrink(8192, 4096, 64, stage="backward", dropout=drawn())),
    Case("shrink backward width 129", _shrink(8192, 4096, 129, stage="backward", dropout=drawn())),
    Case("shrink few rows", _shrink(16, 4096, 16, stage="forward")),
    Case("shrink fp32", _shrink(8192, 4096, 16, FP32), fp32=True),
    Case("shrink of two members", _shrink_of_members(8192, 4096, (64, 64)), training=True),
    Case("shrink of odd members", _shrink_of_members(8192, 4096, (48, 17))),
    Case("shrink of members few rows", _shrink_of_members(16, 4096, (64, 64))),
    Case("expand of a member", _expand_of_member(8192, 11008, 4096, 64), training=True),
    Case("expand rank 16", _expand(8192, 4096, 4096, 16), training=True),
    Case("expand width 64", _expand(8192, 4096, 4096, 64, bias_low=meta(4096)), training=True),
    Case("expand rank 256", _expand(8192, 4096, 4096, 256, bias_low=meta(4096)), training=True),
    Case("expand dropout", _expand(8192, 4096, 4096, 16, dropout=drawn()), training=True),
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
    Case("update rank 64 dropout", _update(8192, 4096, 64, dropout=drawn())),
    Case("update few rows", _update(16, 4096, 64)),
    Case("update fp32", _update(8192, 4096, 16, FP32), fp32=True),
    Case("one_pass small out", _one_pass(8192, 1024, 4096, 16), training=True),
    Case("one_pass few rows", _one_pass(16, 4096, 4096, 64)),
    Case("one_pass fp32", _one_pass(8192, 1024, 4096, 16, FP32), fp32=True),
    Case("expand_backward rank 16", _expand_backward(8192, 4096, 16), training=True),
    Case(
        "expand_backward width 64",
        _expand_backward(8192, 4096, 64, stage="backward", dropout=drawn()),
        training=True,
    ),
    Case(
        "expand_backward of a member rank 16",
        _expand_backward_of_member(8192, 4096, 16, "linear"),
        training=True,
    ),
    Case(
        "expand_backward of a member width 64",
        _expand_backward_of_member(8192, 11008, 64, "backward"),
        training=True,
    ),
    Case("expand_backward fp32", _expand_backward(8192, 4096, 16, FP32), fp32=True),
    Case("shrink_backward rank 16", _shrink_backward(8192, 4096, 16), training=True),
    Case("shrink_backward dropout", _shrink_backward(8192, 4096, 16, dropout=drawn())),
    Case("shrink_backward rank 256", _shrink_backward(8192, 4096, 256), training=True),
    Case("shrink_backward fp32", _shrink_backward(8192, 4096, 16, FP32), fp32=True),
    Case("row_block forward width 64", _row_block(16384, 2048, 64, "forward")),
    Case("row_block backward width 64", _row_block(16384, 2048, 64, "backward")),
    Case("row_block widest", _row_block(16384, 2048, 256, "forward")),
    Case("row_block fp32", _row_block(16384, 2048, 64, "forward", FP32), fp32=True),
    Case("weight_gradients width 64", _weight_gradients(16384, 2048, 64), training=True),
    Case("weight_gradients two_launch", _weight_gradients(2048, 4096, 64, hidden_dtype=FP32)),
    Case("weight_gradients width 256", _weight_gradients(16384, 2048, 256), training=True),
    Case("weight_gradients fp32", _weight_gradients(16384, 2048, 64, FP32, FP32), fp32=True),
    Case("sum_gradients", _sum_gradients),
    Case("sum_parts", _sum_parts),
)
