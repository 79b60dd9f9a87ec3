"""Tables of what `bench.cost_model` predicts for GPUs; nothing in them was measured."""

from typing import Any

from .cost_model import (
    FORMATS,
    GPUS,
    Case,
    artemis,
    bare,
    decode,
    forward,
    full_step,
    hybrid_step,
    peft,
)

_LAYERS = (
    ("4096 → 4096", 4096, (4096,)),
    ("4096 → 1024", 4096, (1024,)),
    ("4096 → 11008", 4096, (11008,)),
    ("8192 → 8192", 8192, (8192,)),
    ("q, k, v of Llama 3 8B", 4096, (4096, 1024, 1024)),
    ("q, k, v of Llama 3 70B", 8192, (8192, 1024, 1024)),
)
PACKED_ROWS = (1, 16, 64, 240, 512, 2048, 8192)
TRAINING_ROWS = (1024, 2048, 8192, 32768)
CASES = tuple(
    Case(name, rows, k, outs, dropout)
    for name, k, outs in _LAYERS
    for rows in (1024, 8192)
    for dropout in (False, True)
)


def kernels(records: list[dict[str, Any]]) -> str:
    """LoRA of rank 16, forward and backward: speed of PEFT's, and time over the bare products."""
    columns = [f"{gpu.name}: {sign}" for gpu in GPUS for sign in ("×", "/")]
    rows = []
    for case in CASES:
        cells = []
        for gpu in GPUS:
            ours = artemis(gpu, case)
            cells += [peft(gpu, case) / ours, ours / bare(gpu, case)]
        rows.append((f"{case.name}, {case.rows:,}, {'0.1' if case.dropout else '0'}", cells))
    return _table("layers, rows, dropout", columns, rows)


def training(records: list[dict[str, Any]]) -> str:
    """Speed of a block's products in a training step, of full fine-tuning in pure bf16."""
    bases = {"16-bit": "16-bit", "8-bit": "fp8"}
    columns = [f"{gpu.name}: {base}" for gpu in GPUS for base in bases]
    rows = [
        (
            f"{count:,}",
            [
                full_step(gpu, count) / hybrid_step(gpu, count, format)
                for gpu in GPUS
                for format in bases.values()
            ],
        )
        for count in TRAINING_ROWS
    ]
    return _table("rows a step", columns, rows)


def decoding(records: list[dict[str, Any]]) -> str:
    """Speed of a block's products at one row with adapters, of the bare 16-bit block."""
    rows = [
        (format, [forward(gpu, 1, "16-bit", False) / decode(gpu, format) for gpu in GPUS])
        for format in FORMATS
    ]
    return _table("base", [gpu.name for gpu in GPUS], rows)


def packed(records: list[dict[str, Any]]) -> str:
    """Speed on an H200 of a block's products with LoRA over a packed base, of the bare 16-bit."""
    (gpu,) = (gpu for gpu in GPUS if gpu.name == "H200")
    rows = []
    for count in PACKED_ROWS:
        plain = forward(gpu, count, "16-bit", adapters=False)
        ratios = [plain / forward(gpu, count, format, adapters=True) for format in FORMATS]
        rows.append((f"{count:,}", ratios))
    return _table("rows", [f"{format}, LoRA" for format in FORMATS], rows)


def _table(first: str, columns: list[str], rows: list[tuple[str, list[float]]]) -> str:
    lines = [f"| {first} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, cells in rows:
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"
