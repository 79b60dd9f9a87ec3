"""Compile kernels exactly as a launch would, for any chip, and read what they need.

`launches_of` runs launchers on meta tensors and keeps the arguments of every launch; `compiled`
specialises a kernel on them (alignment, strides of 1, None pointers) as Triton's launcher does,
and compiles it without a driver. It must run in a process without TRITON_INTERPRET. The private
parts of Triton's API that this needs are used here only.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from ..core.device import Chip


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel and its arguments by name, options (`num_warps`, ...) included."""

    kernel: JITFunction
    arguments: dict


@dataclass(frozen=True)
class Artefact:
    """What was compiled: resources of one kernel and its assembly."""

    registers: int
    stack: int  # bytes of local memory: anything but 0 is a spill or a register array
    shared: int  # bytes
    text: str  # PTX, or AMD assembly
    columns: int = 0  # of tensor memory, which Blackwell's datacentre chips have

    def count(self, pattern: str) -> int:
        """Number of instructions that match a regular expression at their start."""
        return len(re.findall(rf"^\s*(?:@!?%\w+ )?{pattern}", self.text, re.MULTILINE))


@contextmanager
def captured() -> Iterator[list[Launch]]:
    """Record launches instead of running them."""
    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def launches_of(launch: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes."""
    with captured() as launches:
        launch()
    return launches


def compiled(launch: Launch, chip: Chip) -> Artefact:
    """Compile one launch for a chip."""
    target = GPUTarget(chip.backend, chip.generation or chip.name, chip.warp_size)
    backend = make_backend(target)
    kernel = launch.kernel
    arguments = {name: _stand_in(value) for name, value in launch.arguments.items()}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**arguments)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, arguments, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    result = triton.compile(source, target=target, options=options.__dict__)
    if chip.backend == "hip":
        return _amd(result)
    return _nvidia(result)


def _stand_in(value):
    """Meta tensors have no address; an aligned one of the same dtype takes their place."""
    return MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value


def _nvidia(result) -> Artefact:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    columns = result.metadata.tmem_size or 0
    return Artefact(registers, stack, result.metadata.shared, result.asm["ptx"], columns)


def _amd(result) -> Artefact:
    text = result.asm["amdgcn"]
    registers, stack = (
        int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return Artefact(registers, stack, result.metadata.shared, text)
