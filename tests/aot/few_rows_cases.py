"""Cases of the kernels for one to four rows, over every format."""

from artemis_kernels.core import tuning
from artemis_kernels.core.strategies import TENSOR
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.few_rows.matvec import matvec
from artemis_kernels.ops.few_rows.shrink import shrink_rows
from artemis_kernels.ops.packed.epilogue import Epilogue
from tests.aot.case import BF16, FP32, Case, meta, scaled
from tests.aot.packed_cases import packed


def _matvec(m, n, k, r, format, dtype=BF16):
    def launch(chip):
        config = tuning.config(f"matvec_{format}", Shape(m, n, k, r, dtype), chip)
        weight = meta(n, k, dtype=dtype) if format == TENSOR else packed(n, k, format)
        bias, bias_low = meta(n, dtype=dtype), meta(n, dtype=dtype)
        epilogue = Epilogue(meta(m, r), meta(n, r, dtype=dtype), bias, bias_low, scaled())
        matvec(meta(m, k, dtype=dtype), weight, epilogue, config=config)

    return launch


def _shrink(m, k, r, dtype=BF16):
    def launch(chip):
        config = tuning.config("matvec_shrink", Shape(m, k=k, r=r, dtype=dtype), chip)
        shrink_rows(
            meta(m, k, dtype=dtype), meta(r, k, dtype=dtype), config=config, stage="forward",
            bias=meta(r, dtype=dtype), activation="gelu", with_h=True,
        )  # fmt: skip

    return launch


CASES = (
    *(
        Case(f"matvec {format} {m} rows", _matvec(m, 11008, 4096, 64, format))
        for format in (TENSOR, "int8", "fp8", "int4")
        for m in (1, 4)
    ),
    Case("matvec ragged", _matvec(1, 4096, 11008, 128, "int8")),
    Case("matvec fp32", _matvec(4, 4096, 4096, 16, TENSOR, FP32), fp32=True),
    Case("shrink of 1 row", _shrink(1, 4096, 8)),
    Case("shrink of 4 rows", _shrink(4, 11008, 64)),
    Case("shrink of 4 rows fp32", _shrink(4, 4096, 16, FP32), fp32=True),
)
