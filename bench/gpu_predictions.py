"""What GPUs should reach, reckoned from counts of bytes and operations before any of them ran.

A product takes the longer of its bytes and its operations; a pass beside it takes its bytes, a
kernel a launch. The strategy is the one `core.tuning` chooses for the chip: `split` and `one_pass`
pay for a Triton GEMM behind the vendor's, `vendor` writes y once more. Peaks: NVIDIA's data sheets
of H100 SXM, H200 SXM and HGX B200, dense. Shares of them are assumptions, written below.
"""

from typing import Any, NamedTuple

from artemis_kernels.core import tuning
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Shape

RANK, WIDTH, LAUNCH = 16, 64, 3e-6  # seconds between two kernels of one graph
COPY, GEMM_16, GEMM_8 = 0.90, 0.73, 0.61  # shares of the peaks that copies and products reach
_WEIGHT_BYTES = {"16-bit": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
_WEIGHT_SHARE = {"16-bit": 0.90, "int8": 0.85, "int4": 0.72}  # unpacking on the way costs bandwidth


class Gpu(NamedTuple):
    """Peaks: bytes a second, operations a second in 16 and in 8 bits; `chip` a key of CHIPS."""

    name: str
    chip: str
    bandwidth: float
    rate_16: float
    rate_8: float

    def passes(self, size: float, kernels: int = 1) -> float:
        """Seconds of kernels that move `size` bytes."""
        return size / (COPY * self.bandwidth) + kernels * LAUNCH

    def product(self, m: int, k: int, n: int) -> float:
        """Seconds of the vendor's `x Wᵀ` in 16 bits."""
        operations = 2 * m * k * n / (GEMM_16 * self.rate_16)
        return max(operations, 2 * (m * k + k * n + m * n) / (COPY * self.bandwidth)) + LAUNCH

    def product_8(self, m: int, k: int, n: int) -> float:
        """Seconds of a product in 8 bits, x rounded before it."""
        return 2 * m * k * n / (GEMM_8 * self.rate_8) + self.passes(3 * m * k, 2)


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


_LAYERS = (
    ("4096 → 4096", 4096, (4096,)),
    ("4096 → 1024", 4096, (1024,)),
    ("4096 → 11008", 4096, (11008,)),
    ("8192 → 8192", 8192, (8192,)),
    ("q, k, v of Llama 3 8B", 4096, (4096, 1024, 1024)),
    ("q, k, v of Llama 3 70B", 8192, (8192, 1024, 1024)),
)
CASES = tuple(
    Case(name, rows, k, outs, dropout)
    for name, k, outs in _LAYERS
    for rows in (1024, 8192)
    for dropout in (False, True)
)
BLOCK = ((4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,)))


def bare(gpu: Gpu, case: Case) -> float:
    """Forward and dX of the frozen layers alone."""
    return sum(2 * gpu.product(case.rows, case.k, n) for n in case.outs)


def artemis(gpu: Gpu, case: Case) -> float:
    """Forward and backward of LoRA; x is read once a group in either direction."""
    m, k, chip = case.rows, case.k, CHIPS[gpu.chip]
    seconds = gpu.passes(2 * m * k) + gpu.passes(2 * m * k, 2)  # shrink; dA
    for n in case.outs:
        seconds += 2 * gpu.product(m, k, n) + gpu.passes(2 * m * n, 2)  # both products; dS and dB
        strategy, _ = tuning.choose_lora(Shape(m, n, k, RANK), case.dropout, chip)
        if strategy == "vendor":
            seconds += gpu.passes(4 * m * n) + gpu.passes(4 * m * k)
        else:
            operations = 2 * 2 * m * k * n / (GEMM_16 * gpu.rate_16)
            seconds += tuning.vendor_gap(chip) * operations
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


def kernels(records: list[dict[str, Any]]) -> str:
    """LoRA of rank 16, forward and backward: speed of PEFT's, and time over the bare products."""
    lines = _header("layers, rows, dropout", [f"{g.name}: {c}" for g in GPUS for c in ("×", "/")])
    for case in CASES:
        cells = []
        for gpu in GPUS:
            ours = artemis(gpu, case)
            cells += [f"{peft(gpu, case) / ours:.2f}", f"{ours / bare(gpu, case):.2f}"]
        drops = "0.1" if case.dropout else "0"
        lines.append(f"| {case.name}, {case.rows:,}, {drops} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def full_step(gpu: Gpu, rows: int) -> float:
    """A Llama 2 7B block's products with dW, and AdamW over weights and states in 16 bits."""
    seconds = 0.0
    for k, outs in BLOCK:
        for n in outs:
            seconds += 3 * gpu.product(rows, k, n) + gpu.passes(14 * k * n)
    return seconds


def hybrid_step(gpu: Gpu, rows: int, eight_bits: bool) -> float:
    """The same products over a frozen base: LoRA on attention, folded bottlenecks elsewhere."""
    seconds = 0.0
    for place, (k, outs) in enumerate(BLOCK):
        seconds += artemis(gpu, Case("", rows, k, outs, dropout=False))
        for n in outs:
            if eight_bits:
                seconds += gpu.product_8(rows, k, n) + gpu.product_8(rows, n, k)
                seconds -= 2 * gpu.product(rows, k, n)
            if place >= 2:  # D W, and dD through Wᵀ
                seconds += 2 * gpu.product(WIDTH, n, k)
    return seconds


def training(records: list[dict[str, Any]]) -> str:
    """Speed of a block's products in a training step, of full fine-tuning in pure bf16."""
    columns = [f"{g.name}: {base}" for g in GPUS for base in ("16-bit", "8-bit")]
    lines = _header("rows a step", columns)
    for rows in (1024, 2048, 8192, 32768):
        cells = [
            f"{full_step(gpu, rows) / hybrid_step(gpu, rows, eight):.2f}"
            for gpu in GPUS
            for eight in (False, True)
        ]
        lines.append(f"| {rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def decode_block(gpu: Gpu, format: str, adapters: bool) -> float:
    """Seconds of a Llama 2 7B block's weights for one row: bytes, and six launches of adapters."""
    parameters = sum(k * n for k, outs in BLOCK for n in outs)
    size, share = _WEIGHT_BYTES[format] * parameters, _WEIGHT_SHARE[format]
    launches = sum(len(outs) for _, outs in BLOCK) + 6 * adapters
    return size / (share * gpu.bandwidth) + launches * LAUNCH


def decode(records: list[dict[str, Any]]) -> str:
    """Speed of a block's weights at one row with adapters, of the bare 16-bit block."""
    lines = _header("base", [gpu.name for gpu in GPUS])
    for format in _WEIGHT_BYTES:
        ratios = (
            decode_block(gpu, "16-bit", False) / decode_block(gpu, format, True) for gpu in GPUS
        )
        lines.append(f"| {format} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines) + "\n"


def _header(first: str, columns: list[str]) -> list[str]:
    return [f"| {first} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
