"""The line below a table: where and with what it was measured."""

from artemis.benchmark.records import Record


def origin(head: Record) -> str:
    """Where and with what a run was made."""
    peaks = head.get("peaks")
    rates = "" if peaks is None else (
        f" Peaks in the same run: {peaks['gemm_fp32_gflops']:.0f} (fp32) and"
        f" {peaks['gemm_bf16_gflops']:.0f} (bf16) GFLOP/s, copy {peaks['copy_gbs']:.0f} GB/s."
    )  # fmt: skip
    rounds = f", {head['rounds']} rounds" if "rounds" in head else ""
    return f"{_machine(head, rounds)}; commit {_commit(head)}, {head['time'][:10]}.{rates}"


def origins(heads: list[Record]) -> str:
    """The same of several runs in one line a machine."""
    commits: dict[str, dict[str, None]] = {}
    for head in heads:
        commits.setdefault(_machine(head), {})[_commit(head)] = None
    return "\n\n".join(f"{where}; commits {', '.join(by)}." for where, by in commits.items())


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
