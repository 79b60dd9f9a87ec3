"""Where the time of a training step goes, operator by operator, arms side by side.

    python -m bench.profile_step --arms fp32/floor fp32/hybrid
    python -m bench.profile_step --arms bf16/hybrid --details 8

Self time of each operator under torch's profiler, summed by what it is for; the arms take turns.
"adapter masks and glue" is the operations' own time: their native passes and the Python round
their products; "between operators" is the rest of the wall time. The profiler slows each operator
by a few microseconds, so how long a step takes is `bench.train_step`'s matter.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from artemis.benchmark import machine
from artemis.benchmark.accuracy import adapter_parameters, fill_zeros
from artemis.benchmark.arms import TrainingStep
from artemis.benchmark.records import append

from .options import add_case_options, chosen_arms, chosen_case

GROUPS = (
    "base products", "output head", "attention", "adapter products", "adapter masks and glue",
    "adapter element-wise", "model element-wise", "loss", "optimizer", "between operators",
)  # fmt: skip
_PRODUCTS = ("mm", "addmm", "linear", "mkldnn_linear", "addmm_", "mv", "addmv", "addmv_")
_ATTENTION = ("scaled_dot_product",)
_PLAIN_ATTENTION = ("bmm", "_softmax", "_softmax_backward_data")  # nothing else here uses them
_GLUE = (
    "artemis::",
    *(f"_{operation}" for operation in ("LoRALinear", "AdapterLinear", "BottleneckAdapter")),
)  # the operators and their autograd Functions
_WARMUP = 2
_LOSS = ("log_softmax", "nll_loss", "cross_entropy")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_options(parser, default_arms=["fp32/floor", "fp32/hybrid"])
    parser.add_argument("--steps", type=int, default=3, help="profiled steps, two more warm up")
    parser.add_argument("--details", type=int, default=0, help="longest operators of each group")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to FILE")
    options = parser.parse_args(arguments)
    case, steps = chosen_case(parser, options), {}
    for arm in chosen_arms(parser, options):
        steps[arm.path] = step = arm.make(case)
        if not isinstance(step, TrainingStep):
            parser.error(f"--arms: {arm.path} is no training step")
        if adapter_parameters(step.model):
            fill_zeros(step.model)
    columns = profiles(steps, options.steps, case.vocabulary)
    print_groups(columns)
    if options.details:
        print_details(columns, options.details)
    if options.out is not None:
        groups = {path: by_group(column) for path, column in columns.items()}
        record = {"kind": "profile", **machine.facts(), "case": case.to_dict(), "arms": groups}
        append(options.out, [record])
    return 0


def _thin(step: TrainingStep) -> frozenset[int]:
    """Ranks and widths of the adapter: a product with such a side is the adapter's."""
    parameters = adapter_parameters(step.model).values()
    return frozenset(min(p.shape) for p in parameters if p.ndim == 2)


Column = dict[tuple[str, str], float]  # (group, operator and shapes) -> milliseconds a step


def profiles(steps: dict[str, TrainingStep], rounds: int, vocabulary: int) -> dict[str, Column]:
    """Mean milliseconds of each step by group and operator; a round profiles every step once."""
    columns: dict[str, Column] = {path: defaultdict(float) for path in steps}
    for number in range(_WARMUP + rounds):
        for path, step in steps.items():
            for key, milliseconds in _profile(step, vocabulary, _thin(step)).items():
                columns[path][key] += milliseconds / rounds if number >= _WARMUP else 0.0
    return columns


def _profile(step: TrainingStep, vocabulary: int, thin: frozenset[int]) -> Column:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        step()
        wall = (time.perf_counter() - start) * 1e3
    column: Column = defaultdict(float)
    for event in profiler.events():
        if event.self_cpu_time_total > 0 and not _is_a_frame(event):
            key = group_of(event, vocabulary, thin), _label(event)
            column[key] += event.self_cpu_time_total / 1e3
    column["between operators", ""] = wall - sum(column.values())
    return column


def group_of(event: FunctionEvent, vocabulary: int, thin: frozenset[int]) -> str:
    """What an operator's own time is for."""
    name = event.name.rpartition("::")[2]
    ancestors = [event.name, *_ancestors(event)]
    if any(ancestor.startswith("Optimizer.") for ancestor in ancestors):
        return "optimizer"
    fused = any(part in ancestor for ancestor in ancestors for part in _ATTENTION)
    if fused or name in _PLAIN_ATTENTION:
        return "attention"
    if event.name.startswith(_GLUE):
        return "adapter masks and glue"
    if name in _PRODUCTS:
        sizes = {size for shape in event.input_shapes or () for size in _flat(shape)}
        if sizes & thin:
            return "adapter products"
        return "output head" if vocabulary in sizes else "base products"
    if any(part in ancestor for ancestor in ancestors for part in _LOSS):
        return "loss"
    inside = any(ancestor.startswith("artemis::") for ancestor in ancestors)
    return "adapter element-wise" if inside else "model element-wise"


def _flat(shape: Any) -> list[int]:
    """Sizes of a shape; the profiler nests those of tensor lists."""
    if not isinstance(shape, list):
        return [shape]
    return [size for part in shape for size in _flat(part)]


def _ancestors(event: FunctionEvent) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


def _is_a_frame(event: FunctionEvent) -> bool:
    """Autograd's bookkeeping round an operator: its own time lies between operators."""
    return event.name.startswith(("autograd::", "ProfilerStep", "Optimizer.zero_grad"))


def _label(event: FunctionEvent) -> str:
    shapes = [shape for shape in event.input_shapes or () if shape]
    return f"{event.name} {shapes}"


def by_group(column: Column) -> dict[str, float]:
    """Milliseconds by group, in the order of `GROUPS`."""
    totals = dict.fromkeys(GROUPS, 0.0)
    for (group, _), milliseconds in column.items():
        totals[group] += milliseconds
    return {group: round(total, 1) for group, total in totals.items()}


def print_groups(columns: dict[str, Column]) -> None:
    """A row a group, a column an arm."""
    totals = {path: by_group(column) for path, column in columns.items()}
    print("ms a step".ljust(24) + "".join(f"{path:>22}" for path in totals))
    for group in GROUPS:
        print(group.ljust(24) + "".join(f"{each[group]:22.1f}" for each in totals.values()))
    print("sum".ljust(24) + "".join(f"{sum(each.values()):22.1f}" for each in totals.values()))


def print_details(columns: dict[str, Column], count: int) -> None:
    """The longest operators of each group and arm, with the shapes of their inputs."""
    for path, column in columns.items():
        for group in GROUPS:
            longest = sorted(
                ((ms, label) for (of, label), ms in column.items() if of == group), reverse=True
            )
            print(f"\n{path}: {group}")
            for milliseconds, label in longest[:count]:
                print(f"{milliseconds:10.2f}  {label}")


if __name__ == "__main__":
    sys.exit(main())
