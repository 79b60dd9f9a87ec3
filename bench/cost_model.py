"""What GPUs should reach, reckoned from counts of bytes and operations before any of them ran.

A product takes the longer of its bytes and its operations; a pass beside it takes its bytes, a
kernel a launch. How is what the library chooses for the chip: `split` and `one_pass` pay for a
Triton GEMM behind the vendor's, `vendor` writes y once more, packed weights are multiplied as
`core.packed_choice` says. Peaks: NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200, dense.
Shares of them are assumptions, written below.
"""

from typing import NamedTuple

import torch

from artemis_kernels import QuantizedWeight
from artemis_kernels.core import packed_choice, tuning
from artemis_kernels.core.device import CHIPS, Chip
from artemis_kernels.core.tiling import FEW_ROWS, Shape

RANK, WIDTH, LAUNCH = 16, 64, 3e-6  # seconds between two kernels of one graph
COPY, GEMM_16, GEMM_8 = 0.90, 0.73, 0.61  # shares of the peaks that copies and products reach
DEQUANTIZING = 0.5  # of a 16-bit product's rate, where tiles are unpacked in a long loop
#: Bytes a weight takes, and the share of the bandwidth that a product reaches which unpacks it.
FORMATS = {"16-bit": (2.0, 0.90), "int8": (1.0, 0.85), "fp8": (1.0, 0.85), "int4": (0.53125, 0.72)}
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Gpu(NamedTuple):
    """Peaks: bytes a second, operations a second in 16 and 8 bits; `chip_name` a key of CHIPS."""

    name: str
    chip_name: str
    bandwidth: float
    rate_16: float
    rate_8: float

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    def passes(self, size: float, kernels: int = 1) -> float:
        """Seconds of kernels that move `size` bytes."""
        return size / (COPY * self.bandwidth) + kernels * LAUNCH

    def product(
        self, m: int, k: int, n: int, format: str = "16-bit", back: bool = False,
        rounded: bool = False,
    ) -> float:  # fmt: skip
        """Seconds of the vendor's `x Wᵀ` in 16 bits, or of ours by a packed weight.

        `back`: of `dY W`, x [m, k] standing for dY; by weight only there is none. `rounded`: a
        product before this one left x in 8 bits.
        """
        (weight_bytes, share), ends = FORMATS[format], 2 * m * (k + n)
        in_16_bits = 2 * m * k * n / (GEMM_16 * self.rate_16)
        if format == "16-bit":
            return max(in_16_bits, (2 * k * n + ends) / (share * self.bandwidth)) + LAUNCH
        how = self._how(m, k, n, format)
        if how == "dense" or back and how == "weight_only":
            return self.passes((weight_bytes + 2) * k * n) + self.product(m, k, n)
        if how == "weight_only":
            operations = in_16_bits / (1 if m <= FEW_ROWS else DEQUANTIZING)
            moved = (weight_bytes * k * n + ends) / (share * self.bandwidth)
            return max(operations, moved) + LAUNCH
        # x is read, rounded, written and read. In int8 some columns are kept apart: x is read once
        # more, the columns are chosen, and gathered of each weight.
        apart = format == "int8"
        rounding = 0.0 if rounded else self.passes(m * k * (3 + 2 * apart), 1 + 2 * apart)
        transposing = self.passes(2 * k * n) if back else 0.0
        launches = (1 + apart) * LAUNCH
        return 2 * m * k * n / (GEMM_8 * self.rate_8) + launches + rounding + transposing

    def _how(self, m: int, k: int, n: int, format: str) -> str:
        with torch.device("meta"):
            if format == "int4":
                data, scale = torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 128)
                weight = QuantizedWeight(data, scale.bfloat16(), scale.bfloat16(), format, 128)
            else:
                data = torch.empty(n, k, dtype=_DTYPES[format])
                weight = QuantizedWeight(data, torch.empty(n), None, format, None)
        return packed_choice.choose(weight, Shape(m, n, k, RANK), self.chip)[0]


GPUS = (
    Gpu("H100", "sm_90", 3.35e12, 989e12, 1979e12),
    Gpu("H200", "sm_90", 4.8e12, 989e12, 1979e12),
    Gpu("B200", "sm_100", 8.0e12, 2250e12, 4500e12),
)


class Case(NamedTuple):
    """Layers [in, out] that read one x of `rows` rows."""

    name: str
    rows: int
    k: int
    outs: tuple[int, ...]
    dropout: bool


#: The layers of a Llama 2 7B block, by what they read: q, k, v; o; gate, up; down.
BLOCK = ((4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,)))


def bare(gpu: Gpu, case: Case) -> float:
    """Forward and dX of the frozen layers alone."""
    return sum(2 * gpu.product(case.rows, case.k, n) for n in case.outs)


def artemis(gpu: Gpu, case: Case) -> float:
    """Forward and backward of LoRA; x is read once a group in either direction."""
    m, k = case.rows, case.k
    seconds = gpu.passes(2 * m * k) + gpu.passes(2 * m * k, 2)  # shrink; dA
    for n in case.outs:
        parts = tuning.expand_gradient_bytes(Shape(m, n, r=RANK), True, gpu.chip)
        seconds += 2 * gpu.product(m, k, n) + gpu.passes(2 * m * n + parts, 2)  # dS and dB
        strategy, _ = tuning.choose_lora(Shape(m, n, k, RANK), case.dropout, gpu.chip)
        for out, inner, masked in ((n, k, False), (k, n, case.dropout)):  # y, dX
            shape = Shape(m, out, inner, RANK, masked=masked)
            if strategy == "vendor" or tuning.draws_apart(shape, gpu.chip):
                seconds += gpu.passes(4 * m * out)
            else:
                operations = 2 * m * k * n / (GEMM_16 * gpu.rate_16)
                seconds += tuning.product_gap(shape, gpu.chip) * operations
    return seconds


def peft(gpu: Gpu, case: Case) -> float:
    """The same by PEFT's calls, all in 16 bits: nothing is shared, every step is a pass."""
    m, k, seconds = case.rows, case.k, 0.0
    for n in case.outs:
        seconds += 2 * gpu.product(m, k, n)
        seconds += gpu.passes(2 * m * k + 12 * m * n, 4)  # x Aᵀ; S Bᵀ, scale, sum
        seconds += gpu.passes(8 * m * n + 10 * m * k, 6)  # scale, dS, dB; dA, its dX, sum
        if case.dropout:
            seconds += gpu.passes(10 * m * k, 2)
    return seconds


def full_step(gpu: Gpu, rows: int) -> float:
    """A block's products with dW, and AdamW over weights and states in 16 bits."""
    seconds = 0.0
    for k, outs in BLOCK:
        for n in outs:
            seconds += 3 * gpu.product(rows, k, n) + gpu.passes(14 * k * n)
    return seconds


def hybrid_step(gpu: Gpu, rows: int, format: str) -> float:
    """The same products over a frozen base: LoRA on attention, folded bottlenecks elsewhere.

    Layers that read one x are a group, which rounds it once.
    """
    seconds = 0.0
    for place, (k, outs) in enumerate(BLOCK):
        seconds += artemis(gpu, Case("", rows, k, outs, dropout=False))
        for index, n in enumerate(outs):
            seconds += over_packed(gpu, rows, k, n, format, rounded=index > 0)
            if place >= 2:  # D W, and dD through Wᵀ
                seconds += 2 * gpu.product(WIDTH, n, k)
    return seconds


def over_packed(
    gpu: Gpu, rows: int, k: int, n: int, format: str, rounded: bool = False
) -> float:  # fmt: skip
    """Seconds that a layer's two products take longer by a weight in that format; below 0: less."""
    if format == "16-bit":
        return 0.0
    there = gpu.product(rows, k, n, format, rounded=rounded) - gpu.product(rows, k, n)
    return there + gpu.product(rows, n, k, format, back=True) - gpu.product(rows, n, k)


def layer(gpu: Gpu, rows: int, k: int, n: int, format: str) -> float:
    """LoRA's forward over one layer: a launch and its own few bytes more than the product."""
    return gpu.product(rows, k, n, format) + gpu.passes(2 * rows * k + 4 * RANK * (k + n))


def forward(gpu: Gpu, rows: int, format: str, adapters: bool) -> float:
    """A block's products forward."""
    one = layer if adapters else Gpu.product
    return sum(one(gpu, rows, k, n, format) for k, outs in BLOCK for n in outs)


def decode(gpu: Gpu, format: str, rows: int = 1) -> float:
    """A block's products of a few rows, its inputs' low-rank parts read at once: six launches."""
    return forward(gpu, rows, format, adapters=False) + 6 * LAUNCH
