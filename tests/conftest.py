"""What every test starts from: the interpreter where there is no GPU, fixed seeds, few threads."""

import os

import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it must be set before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.kit import GuardedAllocations

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def guarded_allocations(monkeypatch):
    """Poison whatever Python code allocates uninitialised, and check the guard bands round it."""
    allocations = GuardedAllocations()
    allocations.install(monkeypatch)
    yield allocations
    monkeypatch.undo()
    allocations.assert_untouched()
