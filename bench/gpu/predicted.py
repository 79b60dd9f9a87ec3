"""What `bench.cost_model` predicted of a row, beside what was measured.

Of an operation that is its time. Of a whole model only products are reckoned, and it is the speed
against the plain bf16 model, where it trains against full fine-tuning in pure bf16, by the time in
which the GPU was busy.
"""

from typing import Any

from ..cost_model import (
    COPY,
    GEMM_16,
    GPUS,
    RANK,
    Case,
    Gpu,
    artemis,
    bare,
    decode,
    forward,
    full_step,
    hybrid_step,
    layer,
    over_packed,
    peft,
)

Row = dict[str, Any]
_BLOCKS_OF = "llama-2-7b"  # whose block is `cost_model.BLOCK`
_FORMATS = {
    "hybrid": "16-bit", "hybrid-fp8": "fp8", "hybrid-int8": "int8", "hybrid-int4": "int4"
}  # fmt: skip


def gpu_named(name: str) -> Gpu | None:
    """The GPU that predictions are about, by the name that its driver gives it."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)


def compared(row: Row, gpu: Gpu) -> Row:
    """`predicted`, in milliseconds or as a speed, and `over_predicted`; nothing where none is."""
    if "ms" not in row:
        return {}
    if row["kind"] in ("train", "decode"):
        predicted = _speed(row, gpu)
        wall = row["speedup"].get("full-bf16", {}).get("p50")
        measured = row.get("busy_speedup", {}).get("full-bf16", wall)
    else:
        seconds = _seconds(row, gpu)
        predicted, measured = seconds and 1e3 * seconds, row["ms"]["p50"]
    if predicted is None or measured is None:
        return {}
    return {"predicted": predicted, "over_predicted": measured / predicted}


def rates(peaks: Row, gpu: Gpu) -> str:
    """The shares of the data sheet's rates that were measured, and those that were assumed."""
    copy, product = peaks["gbs"] * 1e9 / gpu.bandwidth, peaks["gflops"] * 1e9 / gpu.rate_16
    return (
        f"Of the {gpu.name}'s data sheet: copy {copy:.2f} (predicted with {COPY:.2f}), products in"
        f" 16 bits {product:.2f} (predicted with {GEMM_16:.2f})."
    )


def _seconds(row: Row, gpu: Gpu) -> float | None:
    """Of LoRA of rank 16: one layer or a group, trained; one layer, forward."""
    who = row["provider"].removeprefix("artemis, ")
    if row["kind"] == "group" and row["members"] == "lora" and row["r"] == RANK:
        return _trained(
            gpu, Case("", row["rows"], row["k"], tuple(row["outs"]), row["dropout"]), who
        )
    if row["kind"] == "kernel" and row["op"] == "lora_linear" and row["r"] == RANK:
        sizes, dropout = (row["m"], row["k"], row["n"]), row["dropout"]
        backward = row["pass"] == "both"
    elif row["kind"] == "packed":
        sizes, backward, dropout = (row["rows"], row["k"], row["n"]), row["backward"], 0.0
    else:
        return None
    return _of_layer(gpu, sizes, who, backward, dropout)


def _of_layer(
    gpu: Gpu, sizes: tuple[int, int, int], who: str, backward: bool, dropout: float
) -> float | None:
    format = "16-bit" if who in ("artemis", "16 bits") else who
    m, k, n = sizes
    if backward:
        case = Case("", m, k, (n,), dropout > 0)
        if format in ("int8", "fp8", "int4"):
            return artemis(gpu, case) + over_packed(gpu, m, k, n, format)
        return _trained(gpu, case, who)
    if who == "bare":
        return gpu.product(m, k, n)
    return layer(gpu, m, k, n, format) if format in ("16-bit", "int8", "fp8", "int4") else None


def _trained(gpu: Gpu, case: Case, who: str) -> float | None:
    by = {"artemis": artemis, "16 bits": artemis, "group": artemis, "peft": peft, "bare": bare}
    return by[who](gpu, case) if who in by else None


def _speed(row: Row, gpu: Gpu) -> float | None:
    format = _FORMATS.get(row["arm"])
    if row["model"] != _BLOCKS_OF or format is None:
        return None
    rows = row["tokens"]
    if row["kind"] == "train":
        return full_step(gpu, rows) / hybrid_step(gpu, rows, format)
    return forward(gpu, rows, "16-bit", adapters=False) / decode(gpu, format, rows)
