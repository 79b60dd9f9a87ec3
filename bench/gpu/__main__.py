"""What a GPU can prove, in under ten minutes; installs nothing (torch, triton, transformers).

    python3 -m bench.gpu --out bench/results
    python3 -m bench.gpu --sections accuracy,products --minutes 3 --out /tmp/gpu
    TRITON_INTERPRET=1 python -m bench.gpu --device cpu --tiny --out /tmp/gpu  # every line, no GPU

Most important first: accuracy of every strategy in bf16 and fp16; the products whose measured times
decide the defaults; tuning; operations beside their peers; groups of layers, the loss and what
stands between products; packed weights; training steps and decoding. Each section runs in processes
of its own, so that one that crashes or runs out of time leaves what it had; all write JSON lines,
one by one, to OUT/gpu.jsonl, and OUT/gpu_summary.md sums up. Where no kernel is accurate nothing is
timed. Exit status 1 where anything of Artemis is inaccurate, in time or not, or a section breaks
off.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
import uuid
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from artemis.benchmark import machine
from artemis.benchmark.records import append, read

from .. import ROOT
from .sections import SECTIONS, rows_of
from .summary import summary

#: Timed rounds of what is not tiny, where they are not 20.
ROUNDS = {"tuning": 9, "models": 10}
#: Of a GPU's memory that the process of a rehearsal may take: accuracy is proved beside six.
REHEARSED_SHARE = 0.12
_LEFT_OUT = "left out, since no kernel is accurate"
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.section is not None:
        _run_section(options)
        return 0
    start, run = time.monotonic(), uuid.uuid4().hex[:12]
    header = {
        "kind": "run", "run": run, **machine.facts(), "gpu": machine.accelerator(),
        "device": options.device, "tiny": options.tiny, "minutes": options.minutes,
        "sections": options.sections,
    }  # fmt: skip
    append(_file(options.out), [header])
    states, rehearsals = {}, _rehearsals(options, run)
    try:
        for name, deadline in _deadlines(options, start).items():
            ended = _wait(_start(options, name, SECTIONS[name][0], run), deadline)
            _stop(rehearsals)
            rows = _rows(options.out, name, run)
            states[name] = _state(ended, rows)
            end = {"kind": "end", "run": run, "section": name, "state": states[name]}
            append(_file(options.out), [end])
            print(f"{name}: {states[name]}, {len(rows)} rows", flush=True)
            if name == "accuracy" and not any(row["passed"] for row in rows):
                left = [other for other in options.sections if other != name]
                states |= dict.fromkeys(left, _LEFT_OUT)
                print(f"{', '.join(left) or 'nothing'}: {_LEFT_OUT}", flush=True)
            _summarize(options.out, header, states)
            if _LEFT_OUT in states.values():
                break
    finally:
        _stop(rehearsals)
    print(f"{time.monotonic() - start:.0f} s; {options.out / 'gpu_summary.md'}")
    return 1 if {"failed", _LEFT_OUT} & set(states.values()) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything (default 8.5)")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), metavar="NAME,NAME",
        help=f"some of {', '.join(SECTIONS)}; they share the minutes (default: all)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, fp32 and fp16")
    for internal in ("--section", "--part", "--run"):  # of the processes that this one starts
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = options.sections.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"--sections: got {unknown[0]!r}, allowed: {', '.join(SECTIONS)}")
    options.sections = [name for name in SECTIONS if name in wanted]
    if options.minutes <= 0:
        parser.error(f"--minutes: got {options.minutes}, allowed: more than 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch finds no GPU; allowed: cpu, with --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device: got cpu, allowed: with --tiny only")
    return options


def _deadlines(options: argparse.Namespace, start: float) -> dict[str, float]:
    """When each of the wanted sections ends at the latest; what one leaves, the next ones have."""
    shares = [SECTIONS[name][1] for name in options.sections]
    ends = (share / sum(shares) for share in accumulate(shares))
    seconds = 60 * options.minutes
    return {name: start + seconds * end for name, end in zip(options.sections, ends, strict=True)}


def _file(out: Path) -> Path:
    return out / "gpu.jsonl"


def _start(
    options: argparse.Namespace, section: str, parts: tuple[str, ...], run: str, *more: str
) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "bench.gpu", "--out", options.out.absolute(), "--run", run]
    command += ["--device", options.device, "--section", section]
    command += [*(["--tiny"] if options.tiny else []), *more]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if more else {}
    return [subprocess.Popen([*command, "--part", part], cwd=ROOT, **quiet) for part in parts]


def _rehearsals(options: argparse.Namespace, run: str) -> list[subprocess.Popen]:
    """Later sections run once beside the first, which times nothing: their kernels get compiled.

    Triton and Inductor keep what they compile on disk. Rows are dropped, whatever becomes of it.
    """
    if options.sections[0] != "accuracy":
        return []
    names = options.sections[1:]
    return [
        process for name in names if not options.tiny or name == "products"
        for process in _start(options, name, SECTIONS[name][0], run, "--rehearse")
    ]  # fmt: skip


def _stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait(processes: list[subprocess.Popen], deadline: float) -> str:
    """`passed`, `failed`, or `out of time` where a process had to be stopped."""
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        statuses = [process.poll() for process in processes]  # None: still running
    finally:
        _stop(processes)
    if any(statuses):
        return "failed"
    return "out of time" if None in statuses else "passed"


def _state(ended: str, rows: list[Row]) -> str:
    """How a section ended, its rows considered, which also stand where it was stopped.

    `failed` if Artemis is wrong in any of them; `incomplete` if some of it did not run.
    """
    own = [row for row in rows if str(row.get("provider", "artemis")).startswith("artemis")]
    verdicts = [row["passed"] for row in own if "passed" in row]
    if False in verdicts:
        return "failed"
    return "incomplete" if ended == "passed" and None in verdicts else ended


def _run_section(options: argparse.Namespace) -> None:
    """Write the rows of one part of a section as they come."""
    device, once = torch.device(options.device), options.tiny or options.rehearse
    if options.rehearse:
        os.nice(10)  # what is proved comes first
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(REHEARSED_SHARE)
    rounds = 1 if once else ROUNDS.get(options.section, 20)
    about = {"run": options.run, "section": options.section}
    for row in rows_of(options.section, options.part, device, options.tiny, rounds):
        if not options.rehearse:
            append(_file(options.out), [about | row])


def _rows(out: Path, section: str, run: str) -> list[Row]:
    path = _file(out)
    every = [row for row in read(path) if row["run"] == run] if path.exists() else []
    return [row for row in every if row.get("section") == section and row["kind"] != "end"]


def _summarize(out: Path, header: Row, states: dict[str, str]) -> None:
    rows = {name: _rows(out, name, header["run"]) for name in states}
    (out / "gpu_summary.md").write_text(summary(header, states, rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
