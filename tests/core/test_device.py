"""Facts of a GPU that is not here: asked once, and no part of a traced graph."""

import platform
import warnings
from contextlib import nullcontext
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
def describe(monkeypatch):
    """Has torch describe a GPU; the list of questions that were asked."""

    def forget():
        device._gpu.cache_clear()
        device.has_fast_bf16.cache_clear()

    def describe(hip: str | None = None, **properties):
        asked, described = [], SimpleNamespace(**properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: asked.append(index) or described
        )
        forget()
        return asked

    yield describe
    forget()


def nvidia(major: int, minor: int) -> dict:
    return dict(
        major=major, minor=minor, multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
    )  # fmt: skip


def amd(name: str) -> dict:
    """ROCm's names go on with features: gfx942:sramecc+:xnack-."""
    return dict(
        hip="6.4", gcnArchName=name, multi_processor_count=304,
        shared_memory_per_block=64 * 1024,
    )  # fmt: skip


@pytest.fixture
def hopper(describe):
    """An H100; the list of questions that were asked."""
    return describe(**nvidia(9, 0))


def test_a_gpu_is_asked_once(hopper):
    assert device.chip(GPU) == device.chip(GPU) == CHIPS["sm_90"] == Chip("sm_90", 132, 227 << 10)
    assert hopper == [0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gfx942:sramecc+:xnack-", CHIPS["gfx942"]),
        ("gfx1100", Chip("gfx1100", 304, 64 << 10, 32)),  # RDNA: waves of 32
    ],
)
def test_a_gpu_of_amd(name, expected, describe):
    describe(**amd(name))
    assert device.chip(GPU) == expected and expected.backend == "hip"


@pytest.mark.parametrize(
    ("gpu", "fast"),
    [(nvidia(7, 0), False), (nvidia(8, 0), True), (nvidia(9, 0), True), (amd("gfx942"), True)],
    ids=["sm_70", "sm_80", "sm_90", "gfx942"],
)
def test_which_gpus_multiply_bf16_natively(gpu, fast, describe):
    """Volta's tensor cores know fp16 alone."""
    describe(**gpu)
    assert device.has_fast_bf16(GPU) is fast


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


def test_a_processors_table_is_of_its_threads(monkeypatch):
    names = []
    for threads in (1, 12):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        names.append(device.cpu_name())
    alone, many = names
    assert alone.removesuffix("-1-threads") == many.removesuffix("-12-threads") != alone != many


X86 = """processor\t: 0
cpu family\t: {family}
model\t\t: {model}
model name\t: Some Server
flags\t\t: fpu avx2
"""


def test_a_processor_is_named_with_its_generation(monkeypatch, tmp_path):
    """Virtual machines of two generations may call their processors the same."""
    information, names = tmp_path / "cpuinfo", []
    monkeypatch.setattr(device, "Path", lambda path: information)
    for text in (
        X86.format(family=25, model=17), X86.format(family=26, model=2),
        "processor\t: 0\nFeatures\t: asimd bf16\n",
    ):  # fmt: skip
        information.write_text(text)
        device.processor_name.cache_clear()
        names.append(device.processor_name())
    device.processor_name.cache_clear()
    older, newer, other = names
    assert older == "Some Server, family 25 model 17"
    assert newer == "Some Server, family 26 model 2"
    assert other == platform.machine()


def test_triton_launches_on_the_first_tensor(monkeypatch):
    """Of a list too, where some outputs of a group have no gradient."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: current.append(x) or nullcontext())
    launched = device.launches_on_first_argument(lambda first, other: other)
    one, two = torch.ones(1), torch.ones(1)
    assert launched(one, 3) == launched([None, two], other=3) == 3
    assert current[0] is one and current[1] is two and len(current) == 2
