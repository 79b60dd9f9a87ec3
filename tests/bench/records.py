"""Records as runs of the benchmarks leave them: a head, and rows of training."""

MACHINE = {
    "processor": {"name": "cpu", "flags": []}, "threads": 2, "cores": 2, "memory_gb": 8.0,
    "versions": {"torch": "2.13.0"}, "gpu": None, "dirty": False, "time": "2026-01-02T03:04:05",
}  # fmt: skip
HEAD = {"kind": "run", "run": "1", "commit": "a" * 40, **MACHINE}


def row(run: str, model: str, arm: str, samples: float, peak: float, **more) -> dict:
    ms = 8000 / samples
    return {
        "kind": "row", "table": "train", "run": run, "model": model, "arm": arm, "tokens": 1024,
        "sequence": 128, "how": "measured whole", "ms": {"p50": ms, "p20": 0.8 * ms, "p80": ms},
        "samples_per_second": samples, "memory": {"peak": peak},
        "speedup": {"full-autocast": samples / 2.0}, "flops_relative": 0.7,
        "device_seconds_relative": 2.0 / samples, **more,
    }  # fmt: skip
