"""`pytest bench --benchmark-only`, without its timings: every operation checked and called."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_operation_is_checked_and_called():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-p"]
    command += ["no:cacheprovider", "-q", "-rA", "-k", "q-1-forward or block-1-forward"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    passed = [line.split("[")[1] for line in done.stdout.splitlines() if "PASSED" in line]
    lora = ("artemis", "artemis, int8", "artemis, frozen", "artemis, int8, frozen", "peft")
    names = [f"lora_linear-q-1-forward-{name}]" for name in lora]
    names += [f"bottleneck_adapter-block-1-forward-{name}]" for name in ("artemis", "plain")]
    assert set(names) <= set(passed)
