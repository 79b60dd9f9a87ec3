"""A training step of one micro-batch, forward, loss and backward, replayed as a CUDA graph.

A step of few tokens keeps a GPU busy for less time than Python takes to launch it; replayed, it is
one launch. The first step of a signature (what the batch holds but for its values) runs as it is,
and so compiles and warms up; the second is captured and replayed, and so are all after it.

A graph knows addresses, no names. What it reads of a batch is copied into tensors that stay. It
writes gradients where it wrote them when it was captured, so that one which a parameter still has
at the next replay is copied before. Where the model's tensors, modes or rates of dropout are others
than at the last step, all graphs are dropped.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import TrainingArguments

from ..cuda_graph import capture
from ..errors import AdapterError
from ..layers.bank import find_bank
from ..out_of_memory import is_out_of_memory
from .masks import without_idle_masks

#: Each holds gradients of its own; activations share their memory.
MAX_GRAPHS = 4
_CONSTANTS = (bool, int, float, str, type(None))

#: A micro-batch's inputs, and the number of tokens that divides its loss -> the loss.
Step = Callable[[Mapping[str, Any], Any], torch.Tensor]
#: The loss of a step, and the gradient of each parameter.
Outcome = tuple[torch.Tensor, list[torch.Tensor | None]]


class Recorder(Protocol):
    """What makes graphs of calls."""

    def warm(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `call` returns, run as a capture needs it beforehand."""

    def record(self, call: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        """Tensors, and what writes into them at each call what `call` would return."""


class CudaRecorder:
    """CUDA graphs, captured on one stream of their own and sharing memory."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """On the stream of the captures, whose workspaces so lie outside the graphs."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            result = call()
        before.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
        """A capture computes nothing: the tensors have values after the first replay."""
        outcomes: list[Outcome] = []
        graph = capture(lambda: outcomes.append(call()), self.stream, self.pool)
        return outcomes[0], graph.replay


@dataclass(frozen=True, eq=False)
class _Graph:
    """A recorded step: what it reads, and what it writes."""

    inputs: dict[str, Any]
    parameters: list[nn.Parameter]
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    replay: Callable[[], None]


class StepGraphs:
    """The graphs of one model's training steps, by signature."""

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        self._make_recorder = recorder
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory; gradients that parameters have stay theirs."""
        self._recorder: Recorder | None = None
        self._model: tuple = ()
        self._warm: set[tuple] = set()
        self._graphs: dict[tuple, _Graph] = {}
        #: Parameters whose gradient the next replay may write over.
        self._lent: list[tuple[nn.Parameter, torch.Tensor]] = []

    def step(
        self, step: Step, model: nn.Module, inputs: Mapping[str, Any], items: Any, *constants: Any
    ) -> torch.Tensor:
        """Run `step(inputs, items)`, by a graph where there is one; return the loss.

        Args:
            model: in the mode that it trains in.
            inputs: a micro-batch on the model's device.
            items: a tensor on it, or None.
            constants: what else of Python's values the step depends on.

        Raises:
            AdapterError: a value of `inputs` is no tensor, number or string; the step cannot be
                captured.
        """
        tensors = {**inputs, "num_items_in_batch": items}
        signature = _signature(tensors), constants
        state = _state(model)
        if state != self._model:
            self.clear()
            self._model, self._recorder = state, self._make_recorder()
        if signature not in self._graphs:
            if signature not in self._warm or len(self._graphs) == MAX_GRAPHS:
                self._warm.add(signature)
                return self._recorder.warm(partial(step, inputs, items))
            self._graphs[signature] = self._record(step, model, inputs, items)
        return self._replayed(self._graphs[signature], tensors)

    def _record(
        self, step: Step, model: nn.Module, inputs: Mapping[str, Any], items: Any
    ) -> _Graph:
        inputs, items = type(inputs)({k: _copy(v) for k, v in inputs.items()}), _copy(items)
        parameters = [p for p in model.parameters() if p.requires_grad]
        call = partial(_outcome, partial(step, inputs, items), parameters)
        try:
            with without_idle_masks(inputs):
                (loss, gradients), replay = self._recorder.record(call)
        except RuntimeError as error:
            self.clear()
            if is_out_of_memory(error):
                raise
            cause = error.__context__ or error  # ending a broken capture is an error, too
            raise AdapterError(
                "cuda_graphs: got True, and the step of this model cannot be captured"
                f" ({_first_line(cause)}), allowed: a step that neither waits for the GPU nor reads"
                " a tensor's values in Python; leave cuda_graphs out"
            ) from cause
        read = {**inputs, "num_items_in_batch": items}
        return _Graph(read, parameters, loss, gradients, replay)

    def _replayed(self, graph: _Graph, tensors: Mapping[str, Any]) -> torch.Tensor:
        for name, read in graph.inputs.items():
            if isinstance(read, torch.Tensor):
                read.copy_(tensors[name])
        for parameter, gradient in self._lent:
            if parameter.grad is gradient:
                parameter.grad = gradient.clone()
        graph.replay()
        self._lent = _hand_over(graph.parameters, graph.gradients)
        return graph.loss.clone()


def check_arguments(args: TrainingArguments) -> None:
    """Raise `AdapterError` where steps under `args` cannot be captured."""
    # transformers 5.23 renamed gradient checkpointing.
    names = ("activation_checkpointing", "gradient_checkpointing")
    optimizer = str(getattr(args.optim, "value", args.optim))
    refused = {
        f"on the device {args.device}": args.device.type != "cuda",
        f"in {args.world_size} processes": args.world_size > 1,
        "with activation checkpointing": any(vars(args).get(name) for name in names),
        "with fp16=True": args.fp16,
        "with torch_compile=True": args.torch_compile,
        # These step in the backward pass.
        f"with optim={optimizer}": "lomo" in optimizer or "layerwise" in optimizer,
        "with torch_empty_cache_steps": args.torch_empty_cache_steps is not None,
    }
    _refuse(where for where, found in refused.items() if found)


def check_model(model: nn.Module) -> None:
    """Raise `AdapterError` where steps of `model`, as it stands, cannot be captured."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            _refuse(["with activation checkpointing"])
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            _refuse(["with a model under torch.compile"])


def _refuse(found: Iterable[str]) -> None:
    for where in found:
        raise AdapterError(
            f"cuda_graphs: got True {where}, allowed: in one process on a CUDA device, in fp32 or"
            " bf16, without activation checkpointing, torch.compile, torch_empty_cache_steps and"
            " optimizers that step in the backward pass"
        )


def _state(model: nn.Module) -> tuple:
    """What a graph has of the model in it: equal while a graph is good.

    Of Python's values whether the adapter is enabled, the modes and the rates of dropout.
    """
    bank = find_bank(model)
    found: list[Any] = [bank is not None and bank.enabled]
    for module in model.modules():
        found.append((module.training, module.p if isinstance(module, _DropoutNd) else None))
        found += (
            (id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad)
            for tensor in chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        )
    return tuple(found)


def _signature(values: Mapping[str, Any]) -> tuple:
    return tuple((name, _kind(name, value)) for name, value in values.items())


def _kind(name: str, value: Any) -> tuple:
    """Of a tensor what a graph needs to be the same; anything else whole."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if not isinstance(value, _CONSTANTS):
        raise AdapterError(
            f"cuda_graphs: got a batch whose {name} is a {type(value).__name__}, allowed: tensors,"
            " numbers, strings and None"
        )
    return type(value), value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _outcome(call: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> Outcome:
    """The loss and the gradients of one call alone; those that there are stay as they are."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        return call(), [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


def _hand_over(
    parameters: list[nn.Parameter], gradients: list[torch.Tensor | None]
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Give parameters their gradients, or add them to what they have; return those given."""
    lent, sums, terms = [], [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
            lent.append((parameter, gradient))
        else:
            sums.append(parameter.grad)
            terms.append(gradient)
    if sums:
        torch._foreach_add_(sums, terms)
    return lent


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
