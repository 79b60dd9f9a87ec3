"""The arms: each a way to adapt the same model, and what a step of it is.

An arm more is one entry of `ARMS`.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .. import attention
from ..architectures import output_head
from ..config import HybridAdapterConfig
from ..errors import AdapterError
from ..fusing import fuse_model
from ..hybrid import add_hybrid_adapter_to_model
from ..quantization import quantize_adapter_model
from ..training import attention_for, lean_loss

TARGETS = HybridAdapterConfig().target_modules
RANK = 8
SCALE = 0.5

Adapt = Callable[[PreTrainedModel], nn.Module]


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model that adapters were put on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's


class TrainingStep:
    """Forward, loss, backward and fused AdamW on whatever of `model` requires a gradient.

    An arm whose model is not fused runs transformers' attention, the one that is fastest for its
    precision: `attention_for`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: torch.Tensor,
        autocast: bool = False,
        trainers_loss: bool = False,
    ):
        self.model, self.batch, self.autocast = model, batch, autocast
        self._loss = lean_loss if trainers_loss else contextlib.nullcontext
        if base_of(model).config._attn_implementation != attention.NAME:  # not fused
            computes_in = torch.bfloat16 if autocast else next(model.parameters()).dtype
            fastest = attention_for(computes_in, batch.device, batch.shape[1])
            base_of(model).set_attn_implementation(fastest)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self._adamw() if self.trained else None

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self) -> torch.Tensor:
        """Leave gradients in the parameters; return the loss."""
        context = contextlib.nullcontext()
        if self.autocast:
            context = torch.autocast(self.batch.device.type, torch.bfloat16)
        with context, self._loss(self.model):
            loss = self.model(input_ids=self.batch, labels=self.batch).loss
        loss.backward()
        return loss

    def _adamw(self) -> torch.optim.Optimizer:
        on_gpu = self.batch.device.type == "cuda"  # where a step may be captured as a graph
        return torch.optim.AdamW(self.trained, 1e-4, fused=True, capturable=on_gpu)

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.trained)

    @property
    def state_bytes(self) -> int:
        """Weights, their gradients, and the optimizer's states once it has stepped."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.trained]
        if self.optimizer is not None:
            tensors += [
                value
                for state in self.optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            ]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Arm:
    """A way to train a model whose weights are held in `dtype`.

    `reference` trains the same parameters through the operations' references, for the gate (None:
    nothing is adapted, nothing to check); `masks` says that it draws the same dropout masks.
    `tolerance` replaces the rule of equal rounding where the arm itself rounds the base.
    `state_bytes` is what a weight of the base costs at the peak of a step, for planning. `trains`,
    `infers`: it is measured in training, at inference.
    `recomputes`: it trades time for memory, which `artemis bench memory` shows by default.
    `is_fused`: its norms, gates and rotary embeddings are ours, unless it is compiled.
    `trainers_loss`: as Artemis' trainer computes it, not as transformers does. `needs`: a package;
    without it the arm is none of the default ones. `on_gpu`: nor is it without a GPU. `counted`:
    what stands for it where FLOPs are counted, of products that torch cannot count.
    """

    name: str
    what: str
    dtype: torch.dtype
    adapt: Adapt
    state_bytes: float
    autocast: bool = False
    reference: Adapt | None = None
    masks: bool = True
    tolerance: float | None = None
    trains: bool = True
    infers: bool = True
    recomputes: bool = False
    is_fused: bool = False
    trainers_loss: bool = False
    needs: str | None = None
    on_gpu: bool = False
    counted: Adapt | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        if self.on_gpu and not torch.cuda.is_available():
            return False
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    @property
    def is_full(self) -> bool:
        return self.reference is None

    def step(self, model: PreTrainedModel, batch: torch.Tensor) -> TrainingStep:
        return TrainingStep(self.adapt(model), batch, self.autocast, self.trainers_loss)


def full(model: PreTrainedModel) -> nn.Module:
    """Full fine-tuning: every weight trains."""
    return model


def full_int8(model: PreTrainedModel) -> nn.Module:
    """Full fine-tuning whose layers, but for the head, multiply in int8, all three products.

    torchao's int8 mixed-precision training: weights stay in their dtype and are rounded, row by
    row, at each step anew, like x and dY.
    """
    try:
        from torchao.prototype import quantized_training as torchao_training
        from torchao.quantization import quantize_
    except ModuleNotFoundError as error:
        raise AdapterError("the arm 'full-int8' needs torchao (the extra `torchao`)") from error
    head = output_head(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if not layers:
        return model
    probe = torch.randn(2, layers[0].in_features).to(layers[0].weight)
    plain, linear = layers[0](probe), functional.linear
    quantize_(
        model, torchao_training.int8_mixed_precision_training(),
        filter_fn=lambda module, path: module in layers,
    )  # fmt: skip
    weight = torchao_training.Int8MixedPrecisionTrainingLinearWeight
    # From 0.16 on it registers its product as an aten op, where no call of `linear` finds it.
    weight.implements_torch_function(linear)(weight._ATEN_OP_TABLE[weight][linear])
    if torch.equal(layers[0](probe), plain):
        raise AdapterError(
            f"the arm 'full-int8': torchao {version('torchao')} does not multiply in int8 here,"
            " allowed: 0.18.0"
        )
    return model


def hybrid(model: PreTrainedModel, **settings) -> nn.Module:
    """The hybrid adapter; its defaults, but for `settings` of `HybridAdapterConfig`."""
    if not model.config.num_hidden_layers:
        return model.requires_grad_(False)
    return add_hybrid_adapter_to_model(model, HybridAdapterConfig(**settings))


def hybrid_quantized(
    model: PreTrainedModel, bits: int, include_head: bool = False, format: str = "int"
) -> nn.Module:
    """The default hybrid over a base in 8 or 4 bits; the adapter stays in 32."""
    adapted = hybrid(model)
    if not model.config.num_hidden_layers and not include_head:
        return adapted
    return quantize_adapter_model(
        adapted, bits=bits, format=format, adapter_bits=32, include_head=include_head,
        progress=False,
    )  # fmt: skip


def plain_int8(model: PreTrainedModel) -> nn.Module:
    """The model without any adapter over the same base in 8 bits: what no adapter can go below."""
    if not model.config.num_hidden_layers:
        return model
    return quantize_adapter_model(model, bits=8, progress=False)


def lora(model: PreTrainedModel, dropout: float, **settings) -> nn.Module:
    """Artemis' LoRA on all seven projections, nothing shared between layers."""
    return hybrid(
        model,
        lora_rank=RANK,
        scaling_factor=SCALE,
        lora_dropout=dropout,
        apply_lora_to=TARGETS,
        shared_parameters=False,
        **settings,
    )


def checkpointed(model: PreTrainedModel, adapt: Adapt) -> nn.Module:
    """Adapt; then keep only the layers' inputs, and run each layer once more in the backward."""
    adapted = adapt(model)
    # The name before transformers 5.23 warns in it.
    enable = getattr(adapted, "activation_checkpointing_enable", None)
    (enable or adapted.gradient_checkpointing_enable)({"use_reentrant": False})
    return adapted


def fused(model: PreTrainedModel, adapt: Adapt) -> nn.Module:
    """Adapt; then norms, gates and rotary embeddings by Artemis' operations."""
    adapted = adapt(model)
    fuse_model(adapted)
    return adapted


def peft_lora(model: PreTrainedModel, dropout: float = 0.0) -> nn.Module:
    """PEFT's LoRA on all seven projections in its fastest setting: adapters in the base's dtype."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise AdapterError("the arm 'peft' needs peft (the extra `bench`)") from error
    if not model.config.num_hidden_layers:
        return model.requires_grad_(False)
    config = LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, lora_dropout=dropout, target_modules=list(TARGETS)
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _checkpointed(arm: Arm) -> Arm:
    """The same arm with activation checkpointing; its reference recomputes too."""
    return replace(
        arm,
        name=f"{arm.name}-checkpointed",
        what=f"{arm.what}, checkpointed",
        adapt=partial(checkpointed, adapt=arm.adapt),
        reference=arm.reference and partial(checkpointed, adapt=arm.reference),
        recomputes=True,
    )


def _fused(arm: Arm) -> Arm:
    """The same arm on a fused model; its reference is not."""
    return replace(
        arm,
        name=f"{arm.name}-fused",
        what=f"{arm.what}, fused",
        adapt=partial(fused, adapt=arm.adapt),
        is_fused=True,
        counted=arm.counted or arm.reference or arm.adapt,
    )


_REFERENCE = partial(hybrid, impl="reference")
#: Relative error of gradients over a base in 8 bits: 0.02 to 0.10 were seen at widths 64 to 1,024,
#: and 0.65 and more from width 512 on where dX was dropped in one layer of seven.
_INT8_TOLERANCE = 0.25
#: e4m3 rounds three times as coarsely; 0.05 to 0.12 were seen where only the weight is rounded.
_FP8_TOLERANCE = 0.5
#: Of logits over a base in 4 bits, which err by a tenth of a random weight; unrelated ones by 1.4.
_INT4_TOLERANCE = 0.6
_FP32, _BF16 = torch.float32, torch.bfloat16

_PLAIN = (
    Arm("full-fp32", "full fine-tuning, fp32", _FP32, full, 16),
    Arm(
        "full-autocast", "full fine-tuning, bf16 autocast", _FP32, full, 18, autocast=True,
        infers=False,
    ),
    Arm(
        "full-autocast-lean", "full fine-tuning, bf16 autocast, Artemis' loss", _FP32, full, 18,
        autocast=True, infers=False, trainers_loss=True,
    ),
    Arm("full-bf16", "full fine-tuning, all bf16", _BF16, full, 8),
    Arm(
        "full-int8", "full fine-tuning, all bf16, int8 products (torchao)", _BF16, full_int8, 8,
        infers=False, needs="torchao", counted=full,
    ),
    Arm(
        "plain-int8", "plain model, int8", _BF16, plain_int8, 2, reference=full,
        tolerance=_INT8_TOLERANCE, trains=False,
    ),
    Arm(
        "peft", "PEFT LoRA, all linear, bf16", _BF16, peft_lora, 2,
        reference=partial(lora, dropout=0.0, impl="reference", adapter_dtype="model"),
        masks=False, needs="peft",
    ),
    Arm(
        "hybrid", "hybrid, bf16 base", _BF16, hybrid, 2, reference=_REFERENCE,
        trainers_loss=True,
    ),
    Arm(
        "hybrid-int8", "hybrid, int8 base", _BF16, partial(hybrid_quantized, bits=8), 2,
        reference=_REFERENCE, tolerance=_INT8_TOLERANCE, trainers_loss=True,
    ),
    Arm(
        "hybrid-int8-head", "hybrid, int8 base and head", _BF16,
        partial(hybrid_quantized, bits=8, include_head=True), 2,
        reference=_REFERENCE, tolerance=_INT8_TOLERANCE, trainers_loss=True,
    ),
    Arm(
        "hybrid-fp8", "hybrid, fp8 base", _BF16,
        partial(hybrid_quantized, bits=8, format="fp8"), 2,
        reference=_REFERENCE, tolerance=_FP8_TOLERANCE, trainers_loss=True, on_gpu=True,
    ),
    Arm(
        "hybrid-int4", "hybrid, int4 base", _BF16, partial(hybrid_quantized, bits=4), 2,
        reference=_REFERENCE, tolerance=_INT4_TOLERANCE, trains=False,
    ),
)  # fmt: skip
#: Those of them that are measured on a fused model as well.
_FUSED = (
    "full-autocast-lean",
    "full-bf16",
    "peft",
    "hybrid",
    "hybrid-int8",
    "hybrid-int8-head",
    "hybrid-fp8",
)
ARMS = {
    arm.name: arm
    for plain in _PLAIN
    for arm in ((plain, _fused(plain)) if plain.name in _FUSED else (plain,))
}
#: Those of them whose memory is shown with activation checkpointing as well.
_CHECKPOINTED = ("full-autocast", "full-bf16", "hybrid", "hybrid-int8")
ARMS |= {arm.name: arm for arm in map(_checkpointed, map(ARMS.get, _CHECKPOINTED))}
#: The arm that speeds, FLOPs and device-seconds are relative to.
BASELINE = "full-autocast"
#: The arms of `artemis bench train` and `memory`, and those of `decode`.
TRAINING = tuple(name for name, arm in ARMS.items() if arm.trains)
DECODING = tuple(name for name, arm in ARMS.items() if arm.infers and not arm.recomputes)
