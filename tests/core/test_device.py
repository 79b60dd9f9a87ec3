"""Facts of a GPU that is not here: asked once, and no part of a traced graph."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from artemis_kernels.core import device, tuning
from artemis_kernels.core.device import CHIPS, Chip

GPU = torch.device("cuda", 0)
CHOOSERS = {
    "lora_linear": lambda rows: tuning.lora_strategy(
        rows, 64, 96, 8, False, torch.bfloat16, GPU
    ),
    "adapter_linear": lambda rows: tuning.adapter_strategy(
        rows, 64, 96, 8, True, torch.bfloat16, GPU
    ),
    "bottleneck_adapter": lambda rows: tuning.bottleneck_strategy(
        rows, 64, 8, True, torch.bfloat16, GPU
    ),
}  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    """An H100, as torch describes it; the list of questions that were asked."""
    asked = []
    described = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 * 1024
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: asked.append(index) or described
    )
    device._gpu.cache_clear()
    yield asked
    device._gpu.cache_clear()


def test_a_gpu_is_asked_once(hopper):
    assert device.chip(GPU) == device.chip(GPU) == CHIPS["sm_90"] == Chip("sm_90", 132, 227 << 10)
    assert hopper == [0]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("operation", CHOOSERS)
def test_choosing_a_strategy_is_traced_without_a_warning(operation, dynamic, hopper):
    """torch.compile warns of every functools.cache that it looks through."""
    choose = CHOOSERS[operation]

    def run(x):
        return x + len(choose(x.shape[0])[0])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (7, 12, 100, 9000):  # few and many
            x = torch.zeros(rows)
            assert torch.equal(compiled(x), run(x))
