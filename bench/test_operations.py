"""Each operation beside its peers in pytest-benchmark's tables: `pytest bench --benchmark-only`.

The workloads, peers and gate are those of `artemis bench kernels`, for the layers of a small model.
"""

import functools

import pytest

from artemis.benchmark.kernels import Workload, workloads
from artemis.benchmark.prepare import Prepared, prepare
from artemis.training import default_device, resolve_precision

WORKLOADS = workloads(["512x8"], ["q", "gate", "down", "block"], None, None, full=False)
PROVIDERS = (
    "artemis", "artemis, int8", "artemis, frozen", "artemis, int8, frozen", "plain", "addmm",
    "peft", "bare",
)  # fmt: skip


@functools.cache
def prepared(work: Workload) -> Prepared:
    device = default_device()
    return prepare(work, resolve_precision("auto", device), device, compiles=False)


def name_of(work: Workload) -> str:
    return f"{work.operation.name}-{work.layer}-{work.tokens}-{work.which}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("work", WORKLOADS, ids=name_of)
def test_operation(benchmark, work: Workload, provider: str):
    ready = prepared(work)
    if provider not in ready.rows:
        pytest.skip(f"{name_of(work)} has no such provider")
    assert ready.rows[provider]["gate"]["passed"], ready.rows[provider]["gate"]["where"]
    benchmark.group = "{}, {} x {} x {}, {}, {}".format(
        work.operation.name, *work.sizes, work.which
    )
    benchmark(ready.calls[provider])
