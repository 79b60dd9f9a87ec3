"""What the machine is: the only file that asks.

Everything else takes a `Chip` (or a plain fact) as an argument, so that choices made from it are
pure functions that can be tested for chips which are not here.
"""

import contextlib
import functools
import importlib.util
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

INTERPRETER = "interpreter"


class Chip(NamedTuple):
    """A kernel target: its name and the three facts that tile sizes depend on.

    `name` is `sm_90`, `gfx942`, ... or `interpreter`; `shared_bytes` is what one program may use.
    """

    name: str
    processors: int
    shared_bytes: int
    warp_size: int = 32

    @property
    def backend(self) -> str:
        """Triton's name of the compiler: `cuda` or `hip`."""
        return "hip" if self.name.startswith("gfx") else "cuda"

    @property
    def generation(self) -> int:
        """NVIDIA compute capability as an int (90 for `sm_90`), 0 elsewhere."""
        return int(self.name[3:]) if self.name.startswith("sm_") else 0


# Shared memory: CUDA C++ Programming Guide, technical specifications per compute capability (the
# opt-in maximum per block); AMD CDNA 3 ISA guide, LDS size. Processors: a chip's largest product.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 108, 163 * 1024),
        Chip("sm_86", 84, 99 * 1024),
        Chip("sm_89", 142, 99 * 1024),
        Chip("sm_90", 132, 227 * 1024),
        Chip("sm_100", 148, 227 * 1024),
        Chip("sm_120", 188, 99 * 1024),
        Chip("gfx90a", 110, 64 * 1024, 64),
        Chip("gfx942", 304, 64 * 1024, 64),
        Chip("gfx950", 256, 160 * 1024, 64),
        Chip(INTERPRETER, 4, 1 << 30),
    )
}


def cache_folder() -> Path | None:
    """Where a user's measured tables and the compiled passes are kept; None: there is no home."""
    try:
        return Path.home() / ".cache" / "artemis_kernels"
    except RuntimeError:  # neither HOME nor an entry among the users
        return None


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run interpreted, on CPU tensors: Triton read `TRITON_INTERPRET=1`."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _gpu(index: int) -> tuple[str, int, int, int]:
    """What a `Chip` is made of."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        warp_size = 64 if name.startswith("gfx9") else 32
        shared = properties.shared_memory_per_block
    else:
        name, warp_size = f"sm_{properties.major}{properties.minor}", 32
        shared = properties.shared_memory_per_block_optin
    return name, properties.multi_processor_count, shared, warp_size


def _facts(device: torch.device) -> tuple[str, int, int, int]:
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


# A fact of the machine is no part of a traced graph. This is torch.compiler.assume_constant_result,
# which would import torch._dynamo, and triton with it: a second, for everyone who never compiles.
_facts._dynamo_marked_constant = True


def chip(device: torch.device | Chip) -> Chip:
    """The chip behind a tensor's device; under the interpreter, the interpreter.

    A chip stands for itself: a choice may be asked for one that is not here.
    """
    if isinstance(device, Chip):
        return device
    if device.type != "cuda":
        return CHIPS[INTERPRETER]
    return Chip(*_facts(device))  # tracing follows the properties of what it sees made


def gpu_count() -> int:
    """How many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def made_current(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which Triton launches, and events are recorded, on `device`; of a CPU: nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Of NVIDIA's generations, as Triton supports them: before, products in 16 bits take no tensor cores
# and spill, and the widest tiles do not fit in shared memory.
_OLDEST = 80


def why_no_triton(device: torch.device) -> str | None:
    """One sentence saying why kernels cannot run on tensors of `device`, or None if they can."""
    if not has_triton():
        return "triton is not installed"
    if device.type == "cuda":
        on = chip(device)
        if on.backend == "cuda" and on.generation < _OLDEST:
            return f"the kernels need sm_{_OLDEST} or later of NVIDIA, and this GPU is {on.name}"
        return None
    if device.type == "cpu" and interpreting():
        return None
    return (
        f"the tensors are on {device.type!r}, and triton runs on 'cuda' (or on 'cpu' interpreted)"
    )


why_no_triton._dynamo_marked_constant = True  # as above


def has_autocast(kind: str) -> bool:
    """Whether torch has autocast for a type of device; the meta device has none."""
    return torch.amp.is_autocast_available(kind)


has_autocast._dynamo_marked_constant = True  # as above; torch 2.11 cannot trace it


def launches_on_first_argument(function: Callable) -> Callable:
    """Make the first tensor's device current during the call: Triton launches on that one.

    That is the first argument, or the first that is not None in the list that this is.
    """

    @functools.wraps(function)
    def on_device(first: torch.Tensor | list[torch.Tensor | None], *args, **kwargs):
        given = isinstance(first, torch.Tensor)
        tensor = first if given else next(each for each in first if each is not None)
        with torch.cuda.device_of(tensor):
            return function(first, *args, **kwargs)

    return on_device


@functools.cache
def has_fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether `device` multiplies bf16 matrices natively, well above its fp32 rate."""
    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.version.hip) or chip(device).generation >= 80
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def multiplies_int8(device: torch.device | str = "cpu") -> bool:
    """Whether `device` has int8 dot products that `torch._int_mm` uses for any shape, exactly."""
    if torch.device(device).type != "cpu":
        return False
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


multiplies_int8._dynamo_marked_constant = True  # as above


@functools.cache
def has_bf16_dots() -> bool:
    """Whether 512-bit bf16 dot products are the fastest that this processor has."""
    if torch.cpu._is_amx_tile_supported():  # whose tiles are BLAS's matter
        return False
    return torch.cpu._is_avx512_bf16_supported()


@functools.cache
def has_int8_tiles(device: torch.device) -> bool:
    """Whether products of our own, by 512-bit int8 dot products, are the fastest there."""
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported():  # whose tiles are BLAS's matter
        return False
    return torch.cpu._is_vnni_supported()


def _told_of_processor(*fields: str) -> str | None:
    """What /proc/cpuinfo says first under one of these names; None where there is no such file."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2] for line in lines if line.startswith(fields)), None)


def processor_flags() -> set[str]:
    """Instruction-set flags of this processor: a home folder may be shared by unlike machines."""
    return set((_told_of_processor("flags", "Features") or "").split())


@functools.cache
def processor_name() -> str:
    """What this processor calls itself, and its generation, which a virtual machine may hide."""
    name = (_told_of_processor("model name") or platform.machine()).strip()
    generation = _told_of_processor("cpu family"), _told_of_processor("model\t")
    if None in generation:
        return name
    family, model = (number.strip() for number in generation)
    return f"{name}, family {family} model {model}"


@functools.cache
def _named_for_tables() -> str:
    words = re.findall(r"[a-z0-9]+", processor_name().lower())
    extras = [
        name
        for name, present in (("bf16", has_fast_bf16()), ("int8", multiplies_int8()))
        if present
    ]
    return "-".join(["cpu", *words, *extras])


def cpu_name() -> str:
    """This processor, what it multiplies natively, and the threads torch uses: a table's name."""
    return f"{_named_for_tables()}-{torch.get_num_threads()}-threads"
