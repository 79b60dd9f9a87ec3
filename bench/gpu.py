"""What a GPU can prove, in under ten minutes; installs nothing (torch, triton, transformers).

    python3 -m bench.gpu --out bench/results
    TRITON_INTERPRET=1 python -m bench.gpu --device cpu --tiny --out /tmp/gpu  # every line, no GPU

Most important first: accuracy of every strategy in bf16 and fp16, times of single operations
beside their peers, packed weights, a training step. Each section runs in processes of its own, so
that one that crashes or runs out of time leaves what it had; each writes JSON lines, one by one, to
OUT/gpu_SECTION.jsonl, and OUT/gpu_summary.md sums up. Exit status 1 where anything of Artemis is
inaccurate or a section fails.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from artemis.benchmark import machine
from artemis.benchmark.operations import OPERATIONS
from artemis.benchmark.runner import append, read

from . import ROOT, gpu_accuracy

#: Name -> (its parts, each a process, side by side; the share of all minutes after which it ends).
SECTIONS = {
    "accuracy": (tuple(op.name for op in OPERATIONS), 0.4),
    "kernels": (("",), 0.65),
    "packed": (("",), 0.8),
    "training": (("",), 1.0),
}
ARMS = ("full-autocast", "floor", "peft", "hybrid")
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.section is not None:
        return _run_section(options)
    start, run = time.monotonic(), uuid.uuid4().hex[:12]
    header = {
        "kind": "run", "run": run, **machine.facts(), "gpu": machine.accelerator(),
        "device": options.device, "tiny": options.tiny, "minutes": options.minutes,
    }  # fmt: skip
    states = {}
    for name, (parts, share) in SECTIONS.items():
        append(_file(options.out, name), [header])
        deadline = start + 60 * options.minutes * share
        states[name] = _wait(_start(options, name, parts, run), deadline)
        end = {"kind": "end", "run": run, "state": states[name]}
        append(_file(options.out, name), [end])
        rows = _rows(options.out, name, run)
        print(f"{name}: {states[name]}, {len(rows)} rows", flush=True)
        _summarize(options.out, header, states)
    print(f"{time.monotonic() - start:.0f} s; {options.out / 'gpu_summary.md'}")
    return 1 if "failed" in states.values() else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, fp32 and fp16")
    for internal in ("--section", "--part", "--run"):  # of the processes that this one starts
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: got {options.minutes}, allowed: more than 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU; allowed: cpu, with --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device: got cpu, allowed: with --tiny only")
    return options


def _file(out: Path, section: str) -> Path:
    return out / f"gpu_{section}.jsonl"


def _start(
    options: argparse.Namespace, section: str, parts: tuple[str, ...], run: str
) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "bench.gpu", "--out", options.out.absolute(), "--run", run]
    command += ["--device", options.device, "--section", section]
    command += ["--tiny"] if options.tiny else []
    return [subprocess.Popen([*command, "--part", part], cwd=ROOT) for part in parts]


def _wait(processes: list[subprocess.Popen], deadline: float) -> str:
    """`passed`, `failed`, or `out of time` where a process had to be stopped."""
    in_time = True
    try:
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                in_time = False
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if any(process.returncode > 0 or process.returncode < 0 and in_time for process in processes):
        return "failed"
    return "passed" if in_time else "out of time"


def _run_section(options: argparse.Namespace) -> int:
    """Write the rows of one part of a section as they come; 1 where Artemis is inaccurate."""
    device, failed = torch.device(options.device), False
    for row in _section(options.section, options.part, device, options.tiny):
        append(_file(options.out, options.section), [{"run": options.run, **row}])
        ours = str(row.get("provider", "artemis")).startswith("artemis")
        failed |= ours and row.get("passed") is False
    return 1 if failed else 0


def _section(name: str, part: str, device: torch.device, tiny: bool) -> Iterator[Row]:
    if name == "accuracy":
        (operation,) = (op for op in OPERATIONS if op.name == part)
        return gpu_accuracy.check(operation, device, tiny)
    if name == "kernels":
        from .gpu_speed import kernels

        return kernels(device, tiny)
    if name == "packed":
        from .gpu_packed import packed

        return packed(device, tiny)
    return _training(device, tiny)


def _training(device: torch.device, tiny: bool) -> Iterator[Row]:
    """A training step of a Llama as wide as Llama 3.2 1B, arm after arm; memory is each one's."""
    from artemis.benchmark.runner import Spread
    from artemis.benchmark.timer import Timer

    from .cases import Case, tokens

    case = Case(64, 96, 2, 96, 2, 16) if tiny else Case(2048, 8192, 16, 32768, 4, 1024)
    batch = tokens(case).to(device)
    for arm in ARMS:
        if arm == "peft" and importlib.util.find_spec("peft") is None:
            continue
        step = _training_step(arm, case, batch, torch.float32 if tiny else torch.bfloat16)
        timer = Timer(device, rounds=1 if tiny else 10)
        if timer.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spread = Spread.of(timer.interleaved({arm: step})[arm])
        yield {
            "kind": "training", "arm": arm, "case": case.to_dict(), "ms": spread.to_dict(),
            "trained_parameters": step.trained_parameters,
            "tokens_per_second": round(case.tokens / spread.p50 * 1e3, 1),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if timer.on_gpu else None,
        }  # fmt: skip
        del step
        torch.cuda.empty_cache()


def _training_step(arm: str, case, batch: torch.Tensor, dtype: torch.dtype):
    """One arm on the batch's device; PEFT with dropout 0.1, the hybrid with its defaults."""
    from artemis.benchmark import arms

    from .cases import llama
    from .floors import stop_gradients_before_attention

    full = arm == "full-autocast"
    with batch.device:
        model = llama(case, torch.float32 if full else dtype)
        if arm == "floor":
            stop_gradients_before_attention(model)
        elif arm == "hybrid":
            arms.hybrid(model)
        elif arm == "peft":
            model = arms.peft_lora(model, dropout=0.1)
    return arms.TrainingStep(model, batch, autocast=full)


def _rows(out: Path, section: str, run: str) -> list[Row]:
    path = _file(out, section)
    every = read(path) if path.exists() else []
    return [r for r in every if r["run"] == run and r["kind"] not in ("run", "end")]


def _summarize(out: Path, header: Row, states: dict[str, str]) -> None:
    """Write the tables of what this run has so far."""
    gpu = header["gpu"] or {"name": "CPU, Triton interpreted", "driver": None}
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        "# What a GPU showed", "",
        f"{gpu['name']}, driver {gpu['driver']}; {versions}; commit {header['commit']}"
        f"{' with changes' if header['dirty'] else ''}; {header['time']}; run {header['run']}.", "",
        *(f"- {name}: {state}" for name, state in states.items()),
    ]  # fmt: skip
    accuracy, kernels, packed, training = (_rows(out, name, header["run"]) for name in SECTIONS)
    lines += ["", "## Accuracy: largest error over its limit (passes up to 1)", ""]
    lines += ["| operation | strategy | dtype | cases | failed | worst | where |", "|" + "---|" * 7]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in accuracy:
        groups.setdefault((row["op"], row["strategy"], row["dtype"]), []).append(row)
    for key, rows in groups.items():
        worst = max(rows, key=lambda row: float("inf") if row["ratio"] is None else row["ratio"])
        failed = sum(not row["passed"] for row in rows)
        lines.append(_line(*key, len(rows), failed, worst["ratio"], _where(worst)))
    lines += ["", "## Operations", ""]
    lines += [
        f"Peaks: {row['tflops']:.4g} TFLOP/s, copy {row['gbs']:.4g} GB/s.\n"
        for row in kernels if row["kind"] == "peaks"
    ]  # fmt: skip
    titles = (
        "operation|m × k × n, r|dropout|pass|provider|ms|TFLOP/s|GB/s|÷ floor|÷ best peer|error"
    )
    lines += [_line(*titles.split("|")), "|" + "---|" * 11]
    lines += [_kernel_line(row) for row in kernels if row["kind"] == "kernel"]
    lines += ["", "## LoRA over a packed base", ""]
    lines += [_line("m × k × n", "pass", "base", "ms", "÷ 16-bit bare", "error ÷ limit")]
    lines += ["|" + "---|" * 6, *(_packed_line(row) for row in packed)]
    lines += ["", "## Training step", ""]
    lines += [_line("arm", "tokens/s", "ms", "peak GB", "trained parameters"), "|" + "---|" * 5]
    lines += [
        _line(
            r["arm"], r["tokens_per_second"], r["ms"]["p50"], r["peak_gb"], r["trained_parameters"]
        )
        for r in training
    ]
    (out / "gpu_summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _kernel_line(row: Row) -> str:
    size, strategy = row["sizes"], row.get("strategy")
    provider = row["provider"] + (f" ({strategy})" if strategy else "")
    shape = f"{size['m']} × {size['k']} × {size['n']}, {size['r']}"
    ms = row["ms"]["p50"] if "ms" in row else f"not timed: {row['where']}"
    return _line(
        row["op"], shape, row["dropout"], "both" if row["backward"] else "forward", provider, ms,
        *(row.get(name) for name in ("tflops", "gbs", "over_floor", "over_best_peer", "error")),
    )  # fmt: skip


def _packed_line(row: Row) -> str:
    strategy = row.get("strategy")
    provider = row["provider"] + (f" ({strategy})" if strategy else "")
    ms = row["ms"]["p50"] if "ms" in row else f"not timed: {row['where']}"
    return _line(
        f"{row['rows']} × {row['k']} × {row['n']}", "both" if row["backward"] else "forward",
        provider, ms, row.get("over_bare"), row.get("error"),
    )  # fmt: skip


def _where(row: Row) -> str:
    sizes = "×".join(str(size) for size in row["sizes"].values())
    return f"{row['where']} at {sizes}, dropout {row['dropout']}"


def _line(*cells: Any) -> str:
    shown = (f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells)
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "/") for cell in shown) + " |"


if __name__ == "__main__":
    sys.exit(main())
