"""Candidates compiled side by side, by processes of their own.

What they compile for is a chip, which need not be there; it stays in Triton's cache on disk, where
a launch finds it. A job is a line of JSON, its answer another: the fields of `Resources`, or null
where Triton makes no code.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from ..core.device import Chip
from ..core.tiling import Config, Shape

_MOST_WORKERS = 16  # each holds torch and Triton's compiler
_PROGRAM = f"""import json, sys
sys.path[:] = json.loads(sys.argv[1])  # packages are found there as they are here
from {__name__} import main
main()"""
#: (kernel, shape, config) -> the fields of `Resources`, or None.
Compile = Callable[[str, Shape, Config], list[int] | None]


def usable_cores() -> int:
    """Cores that this process may use, up to the number of workers that make sense."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


@contextlib.contextmanager
def side_by_side(chip: Chip, workers: int) -> Iterator[tuple[Compile, Callable]]:
    """A function that compiles for `chip` in a worker's process, and the `map` to call it by."""
    processes: list[subprocess.Popen] = []
    mine = threading.local()  # a thread has a process

    def compile_one(kernel: str, shape: Shape, config: Config) -> list[int] | None:
        if not hasattr(mine, "process"):
            mine.process = _started()
            processes.append(mine.process)
        return _answer(mine.process, _job(kernel, shape, config, chip))

    pool = ThreadPoolExecutor(workers)
    try:
        yield compile_one, pool.map
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.wait()


def _started() -> subprocess.Popen:
    command = (sys.executable, "-c", _PROGRAM, json.dumps(sys.path))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _job(kernel: str, shape: Shape, config: Config, chip: Chip) -> str:
    sizes = shape._asdict() | {"dtype": str(shape.dtype).removeprefix("torch.")}
    return json.dumps([kernel, sizes, asdict(config), chip._asdict()])


def _answer(process: subprocess.Popen, job: str) -> list[int] | None:
    print(job, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"tune: the process that compiled {job} ended; see its error above")
    return json.loads(answer)


def main() -> None:
    """Answer jobs until standard input ends."""
    from triton.errors import TritonError

    from . import tiles

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers may print
    for line in sys.stdin:
        kernel, sizes, config, chip = json.loads(line)
        shape = Shape(**sizes | {"dtype": getattr(torch, sizes["dtype"])})
        try:
            found = tiles.compiled_resources(kernel, shape, Config(**config), Chip(**chip))
        except TritonError:
            found = None
        print(json.dumps(found), file=answers, flush=True)
