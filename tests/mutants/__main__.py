"""Apply each fault to a copy of the tree, run its tests, and demand that they fail."""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("artemis_kernels", "artemis", "bench", "tests", "examples", "pyproject.toml")
GREEN, RED = 0, 1  # pytest's exit statuses: all passed, some failed


def main() -> int:
    """Return 0 if every fault was seen."""
    arguments = _arguments()
    faults = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    if arguments.list:
        print(*(fault.name for fault in faults), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        trees = [_copy(Path(scratch, str(worker))) for worker in range(arguments.workers)]
        test_sets = sorted({fault.tests for fault in faults})
        for tests, output in zip(
            test_sets, _spread(_complaint, test_sets, trees, "baseline"), strict=True
        ):
            if output:
                print(f"fails without any fault: {' '.join(tests)}\n{output}", file=sys.stderr)
                return 1
        verdicts = _spread(_verdict, faults, trees, "fault")
    for fault, verdict in zip(faults, verdicts, strict=True):
        print(f"{verdict:10} {fault.file:46} {fault.name}")
    survivors = sum(verdict != "seen" for verdict in verdicts)
    print(f"{len(faults) - survivors} of {len(faults)} faults seen")
    return 1 if survivors else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the faults to try")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="copies at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no fault is named {sorted(unknown)}; --list shows the names")
    return arguments


def _copy(tree: Path) -> Path:
    """The parts of the repository that tests need, in a place where they may be spoilt."""
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tree / name)
    return tree


def _spread(function: Callable, items: Iterable, trees: list[Path], unit: str) -> list:
    """`function(tree, item)` for every item, in order, each tree in one use at a time."""
    free: queue.Queue[Path] = queue.Queue()
    for tree in trees:
        free.put(tree)

    def with_a_tree(item):
        tree = free.get()
        try:
            return function(tree, item)
        finally:
            free.put(tree)

    items = list(items)
    with ThreadPoolExecutor(len(trees)) as pool:
        results = pool.map(with_a_tree, items)
        return list(tqdm(results, total=len(items), unit=unit, disable=not sys.stderr.isatty()))


def _complaint(tree: Path, tests: tuple[str, ...]) -> str:
    """What the tests say on the untouched copy, if they fail there; else nothing."""
    status, output = _pytest(tree, tests)
    return "" if status == GREEN else output[-3000:]


def _verdict(tree: Path, fault: Fault) -> str:
    """`seen`, `SURVIVED`, or what else went wrong."""
    path = tree / fault.file
    original = path.read_text()
    if original.count(fault.old) != 1:
        return f"TEXT x{original.count(fault.old)}"
    path.write_text(original.replace(fault.old, fault.new))
    status, _ = _pytest(tree, fault.tests)
    path.write_text(original)
    return {RED: "seen", GREEN: "SURVIVED"}.get(status, f"STATUS {status}")


def _pytest(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of `tests` in `tree`, in a process that sees no other copy."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        # A stale .pyc of the same second and size would hide a fault.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Passes compiled from a spoilt source stay out of the user's cache.
        "HOME": str(tree.parent),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


if __name__ == "__main__":
    sys.exit(main())
