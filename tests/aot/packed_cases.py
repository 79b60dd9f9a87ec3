"""Cases of the kernels over weights in 8 and 4 bits."""

import torch

from artemis_kernels.core import tuning
from artemis_kernels.core.eight_bit_rows import Peaks
from artemis_kernels.core.quantized import QuantizedWeight
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT
from artemis_kernels.ops.packed.columns_apart import weights_apart
from artemis_kernels.ops.packed.eight_bit import eight_bit
from artemis_kernels.ops.packed.epilogue import Epilogue, finish
from artemis_kernels.ops.packed.round_logits import round_logits
from artemis_kernels.ops.packed.round_rows import round_rows
from artemis_kernels.ops.packed.transpose import transpose
from artemis_kernels.ops.packed.unpack import unpack
from artemis_kernels.ops.packed.weight_only import weight_only
from tests.aot.case import BF16, FP8, WITH_FP8, Case, drawn, meta, scaled


def _epilogue(m, n, r, **more):
    return Epilogue(meta(m, r), meta(n, r), meta(n, dtype=BF16), scale=scaled(), **more)


def packed(n, k, format):
    if format != "int4":
        data = meta(n, k, dtype=torch.int8 if format == "int8" else FP8)
        return QuantizedWeight(data, meta(n), None, format, None)
    scale, offset = meta(n, k // 128, dtype=BF16), meta(n, k // 128, dtype=BF16)
    return QuantizedWeight(meta(n, k // 2, dtype=torch.uint8), scale, offset, format, 128)


def _format(dtype):
    return "int8" if dtype == torch.int8 else "fp8"


def _weight_only(m, n, k, r, format):
    def launch(chip):
        config = tuning.config(f"weight_only_{format}", Shape(m, n, k, r, BF16), chip)
        x = meta(m, k, dtype=BF16)
        weight_only(x, packed(n, k, format), _epilogue(m, n, r), config=config)

    return launch


def _unpack(n, k, format):
    def launch(chip):
        config = tuning.config(f"unpack_{format}", Shape(1, n, k, dtype=BF16), chip)
        unpack(packed(n, k, format), BF16, config=config)

    return launch


def _transpose(n, k, dtype):
    def launch(chip):
        config = tuning.config(f"transpose_{_format(dtype)}", Shape(1, n, k), chip)
        transpose(meta(n, k, dtype=dtype), config=config)

    return launch


def _eight_bit(m, n, k, r, dtype, dropout=NO_DROPOUT, precise=False, adds=False):
    def launch(chip):
        shape = Shape(m, n, k, r, BF16, bool(dropout.p))
        config = tuning.config(f"eight_bit_{_format(dtype)}", shape, chip)
        more = {"row": meta(m), "column": meta(n), "dropout": dropout}
        if adds:
            more["residual"] = meta(m, n, dtype=BF16)
        if dtype == torch.int8:
            more |= {"xa": meta(m, 16, dtype=BF16), "wa": meta(n, 16, dtype=BF16)}
        eight_bit(
            meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, n, dtype=BF16),
            _epilogue(m, n, r, **more), config=config, precise=precise,
        )  # fmt: skip

    return launch


def _round_rows(m, k, dtype):
    def launch(chip):
        config = tuning.config(f"round_rows_{_format(dtype)}", Shape(m, k, dtype=BF16), chip)
        round_rows(meta(m, k, dtype=BF16), dtype, meta(k), config=config)

    return launch


def _weights_apart(n, k, transposed):
    def launch(chip):
        data, columns = meta(n, k, dtype=torch.int8), meta(16, dtype=torch.int64)
        weights_apart(data, meta(n), columns, BF16, transposed=transposed)

    return launch


def _peaks(m, n, k):
    """What dX of a head has beside a layer's: peaks, and lines of the weight for them."""
    peaks = Peaks(meta(m), meta(m, dtype=torch.int64))
    return {"peaks": peaks, "lines": meta(k, n, dtype=torch.int8)}


def _logits(m, n, k, r, dropout=NO_DROPOUT, adds=False):
    def launch(chip):
        shape = Shape(m, n, k, r, BF16, bool(dropout.p))
        config = tuning.config("eight_bit_int8", shape, chip)
        more = _peaks(m, n, k) | {"row": meta(m), "dropout": dropout}
        if adds:
            more["residual"] = meta(m, n, dtype=BF16)
        eight_bit(
            meta(m, k, dtype=torch.int8), meta(n, k, dtype=torch.int8), meta(m, n, dtype=BF16),
            Epilogue(meta(m, r), meta(n, r), scale=scaled(), **more), config=config, precise=True,
        )  # fmt: skip

    return launch


def _round_logits(m, k):
    def launch(chip):
        config = tuning.config("round_logits_int8", Shape(m, k, dtype=BF16), chip)
        round_logits(meta(m, k, dtype=BF16), meta(k), config=config)

    return launch


def _finish_product(m, n, r, peaked=0):
    def launch(chip):
        config = tuning.config("finish_product_int8", Shape(m, n, r=r, dtype=BF16), chip)
        more = {"row": meta(m)} | (_peaks(m, n, peaked) if peaked else {"column": meta(n)})
        parts, y = meta(1, m, n, dtype=torch.int32), meta(m, n, dtype=BF16)
        finish(parts, y, _epilogue(m, n, r, **more), config=config)

    return launch


CASES = (
    *(
        Case(f"weight_only {format} {m} rows", _weight_only(m, 4096, 4096, 16, format))
        for format in ("int8", "fp8", "int4")
        for m in (16, 64, 256)
    ),
    Case("unpack int8", _unpack(4096, 4096, "int8")),
    Case("unpack int4", _unpack(4096, 4096, "int4")),
    Case("transpose int8", _transpose(11008, 4096, torch.int8)),
    Case("transpose fp8", _transpose(4096, 11008, FP8), chips=WITH_FP8),
    Case(
        "eight_bit int8",
        _eight_bit(8192, 4096, 4096, 16, torch.int8),
        training=True,
        eight_bit=True,
    ),
    Case("eight_bit int8 dropout", _eight_bit(8192, 4096, 4096, 16, torch.int8, drawn())),
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
        _eight_bit(8192, 4096, 4096, 16, FP8, drawn(), precise=True),
        training=True,
        chips=WITH_FP8,
        eight_bit=True,
    ),
    Case("eight_bit int8 added", _eight_bit(8192, 4096, 11008, 64, torch.int8, adds=True)),
    Case("eight_bit int8 logits", _logits(8192, 2048, 32000, 16), training=True, eight_bit=True),
    Case("eight_bit int8 logits dropout", _logits(8192, 2048, 32000, 64, drawn())),
    Case("eight_bit int8 logits added", _logits(8192, 2048, 32000, 16, adds=True)),
    Case("eight_bit odd", _eight_bit(8192, 4097, 4097, 16, torch.int8)),
    Case("round_rows int8", _round_rows(8192, 4096, torch.int8)),
    Case("weights_apart", _weights_apart(4096, 11008, transposed=False)),
    Case("weights_apart transposed", _weights_apart(11008, 4096, transposed=True)),
    Case("round_rows fp8", _round_rows(8192, 4096, FP8), chips=WITH_FP8),
    Case("round_logits", _round_logits(8192, 32000)),
    Case("finish_product int32", _finish_product(8192, 4096, 16)),
    Case("finish_product int32 logits", _finish_product(8192, 2048, 16, peaked=32000)),
)
