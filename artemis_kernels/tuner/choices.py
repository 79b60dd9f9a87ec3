"""What calls would take, and why, on this machine or on a chip that is not here; nothing runs."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..core import call, tables
from ..core import device as devices
from ..core.device import CHIPS, INTERPRETER, Chip
from ..core.quantized import QuantizedWeight, default_group_size
from ..core.strategies import TENSOR, Case
from ..core.tiling import Config
from ..ops import members
from ..ops.adapter_linear import group as adapter_linear_group
from ..ops.lora_linear import group as lora_linear_group
from . import lookups
from .requests import calls_of, check, check_device, check_dtype
from .workload import module_of

_GROUPS = {module.NAME: module for module in (lora_linear_group, adapter_linear_group)}
_Sizes = tuple[int, int, int]


class Tiles(NamedTuple):
    """The tiles of one kernel and (bucketed) shape; `origin`: `default`, `user's` or `shipped`."""

    kernel: str
    shape: str
    config: Config
    origin: str


class Chosen(NamedTuple):
    """What a call takes, and the tiles that this looks up; the eager path has none."""

    op: str
    impl: str
    strategy: str
    reason: str
    tiles: tuple[Tiles, ...]


def choices(
    shapes: Iterable[_Sizes],
    rows: Iterable[int],
    *,
    op: str = "adapter_linear",
    weight: str = TENSOR,
    dtype: str = "bfloat16",
    trains: bool = True,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
) -> dict[tuple[_Sizes | tuple[_Sizes, ...], int], Chosen]:
    """What a call of each shape and number of rows takes by the tables of `device`, or by costs.

    A group is one call of all shapes, those of its members, and has them all in its key.

    Args:
        device: "cpu", a GPU that is here, or the name of a chip that need not be: "sm_90".
        shapes, rows, op, weight, dtype, trains, dropout_p: as in `tune`.

    Raises:
        ValueError: arguments that `tune` would refuse; a device or chip that is neither; a table
            that is malformed.
    """
    shapes, rows = tuple(map(tuple, shapes)), tuple(rows)
    check("choices", shapes, rows, 1, op, weight, dtype)
    place = _place(device, dtype)
    calls = calls_of(op, shapes, rows, dtype, weight, trains, dropout_p > 0)
    return {key: _chosen(op, cases, place) for key, cases in calls.items()}


def _chosen(op: str, cases: Sequence[Case], place: torch.device | Chip) -> Chosen:
    each, tiles = [_path(case, place) for case in cases], ()
    if each[0].impl == "triton":
        chip, strategies = devices.chip(place), [path.strategy for path in each]
        tiles = tuple(
            Tiles(kernel, shape.bucket.key, *tables.tiles(kernel, shape, chip))
            for kernel, shape in lookups.of_call(cases, strategies, chip)
        )
    path = each[0]
    if op in _GROUPS:
        group, outputs = _GROUPS[op], [lookups.output_of(case) for case in cases]
        path = members.path(each, group.why_apart(each), group.what_joins(each, outputs, place))
    return Chosen(op, *path, tiles)


def _path(case: Case, place: torch.device | Chip) -> call.Path:
    impl, why = "triton", ""
    if isinstance(place, torch.device):
        impl, why = call.implementation(case.op, None, case.torch_dtype, place, False)
    usual = module_of(case.op).usual(case, impl, _weight(case, place), place)
    strategy, reason = tables.choice(case, impl, place, usual)
    return call.Path(impl, strategy, " and ".join(filter(None, (why, reason))))


def _weight(case: Case, place: torch.device | Chip) -> torch.Tensor | QuantizedWeight | None:
    """A weight of a case's kind and sizes; its numbers are never written or read."""
    if not case.in_features:
        return None
    n, k = case.out_features, case.in_features

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        on_cpu = isinstance(place, torch.device) and place.type == "cpu"
        return torch.empty(sizes, dtype=dtype, device="cpu" if on_cpu else "meta")

    if case.format == TENSOR:
        return empty(n, k, dtype=case.torch_dtype)
    bits = case.bits if case.bits == "auto" else int(case.bits)
    if case.format == "int4":
        group = default_group_size(k)
        scale, data = (
            empty(n, k // group, dtype=torch.bfloat16),
            empty(n, k // 2, dtype=torch.uint8),
        )
        return QuantizedWeight(data, scale, scale, case.format, group, bits)
    numbers = torch.float8_e4m3fn if case.format == "fp8" else torch.int8
    return QuantizedWeight(empty(n, k, dtype=numbers), empty(n), None, case.format, None, bits)


def _place(device: torch.device | str, dtype: str) -> torch.device | Chip:
    """The device that is here, or the chip of that name."""
    known = [name for name in CHIPS if name != INTERPRETER]
    if str(device) in known:
        check_dtype("choices", dtype)
        return CHIPS[str(device)]
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(
            f"choices: device must be 'cpu', 'cuda' or one of {known}, got {str(device)!r}"
        )
    device = torch.device(device)
    check_device("choices", device, dtype)
    return device
