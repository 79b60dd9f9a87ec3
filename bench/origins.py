"""The line below a table: where and with what it was measured."""

from collections.abc import Callable, Sequence

from artemis.benchmark.records import Record


def origin(head: Record) -> str:
    """Where and with what a run was made."""
    rounds = f", {head['rounds']} rounds" if "rounds" in head else ""
    return f"{_machine(head, rounds)}; {_run(head)}"


def origins(heads: Sequence[Record]) -> str:
    """The same of several runs, in one line a machine."""
    machines = _by_machine(heads, _commit)
    return "\n\n".join(f"{where}; commits {', '.join(by)}." for where, by in machines.items())


def origins_listed(heads: Sequence[Record]) -> str:
    """The same, with a point for each run of a machine that has several."""
    machines = _by_machine(heads, _run)
    return "\n\n".join(
        f"{where}; {by[0]}" if len(by) == 1 else "\n- ".join([f"{where}:\n", *by])
        for where, by in machines.items()
    )


def _by_machine(heads: Sequence[Record], what: Callable[[Record], str]) -> dict[str, list[str]]:
    machines: dict[str, dict[str, None]] = {}
    for head in heads:
        machines.setdefault(_machine(head), {})[what(head)] = None
    return {where: list(by) for where, by in machines.items()}


def _run(head: Record) -> str:
    """Its commit, its day, and what the machine could do then."""
    peaks = head.get("peaks")
    rates = "" if peaks is None else (
        f" Peaks in the same run: {peaks['gemm_fp32_gflops']:.0f} (fp32) and"
        f" {peaks['gemm_bf16_gflops']:.0f} (bf16) GFLOP/s, copy {peaks['copy_gbs']:.0f} GB/s."
    )  # fmt: skip
    return f"commit {_commit(head)}, {head['time'][:10]}.{rates}"


def _machine(head: Record, rounds: str = "") -> str:
    flags = ", ".join(head["processor"]["flags"])
    versions = ", ".join(
        f"{name} {version}"
        for name, version in head["versions"].items()
        if name in ("python", "torch", "transformers", "peft")
    )
    kept = f"; allocator: {head['allocator']}" if "allocator" in head else ""
    name, threads = head["processor"]["name"], head["threads"]
    return f"{name} ({flags}), {threads} threads{rounds}{kept}; {versions}"


def _commit(head: Record) -> str:
    state = " with uncommitted changes" if head["dirty"] else ""
    return f"`{(head['commit'] or 'unknown')[:12]}`{state}"
