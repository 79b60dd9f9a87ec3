"""The training file: model, data, adapter and training settings in one YAML document.

```yaml
model: path/or/name           # a causal language model for transformers
data:                         # DataConfig
  train: [train.jsonl]
base:                         # BaseConfig: the frozen base in fewer bits
  bits: 8
hybrid_adapter:               # HybridAdapterConfig; without this section the whole model is trained
  lora_rank: 8
training:                     # TrainingConfig
  learning_rate: 1e-3
```

`examples/train.yaml` holds every key.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainingArguments

from .. import schema
from ..config import HybridAdapterConfig
from ..errors import AdapterError
from ..quantization.options import checked_options
from ..yaml_file import read_yaml
from .compiling import require_compiler
from .loading import PRECISIONS, default_device

#: The largest that numpy takes.
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class BaseConfig:
    """How the base under an adapter is held; a model that is trained whole stays as it is.

    Attributes:
        bits: 8 or 4, of the linear layers' weights; None keeps them.
        format: with 8 bits int or fp8.
        group_size: with 4 bits, how many weights share a scale; None fits it to the layer.
        activation_bits: 8 rounds what int8 and fp8 weights are multiplied by, 16 does not, auto
            does where it is faster.
        include_head: take the output head too.
    """

    SECTION: ClassVar[str] = "base"

    bits: int | None = schema.choice(8, 4, None, default=None)
    format: str = schema.choice("int", "fp8", default="int")
    group_size: int | None = schema.choice(256, 128, 64, 32, 16, 8, None, default=None)
    activation_bits: int | str = schema.choice("auto", 8, 16, default="auto")
    include_head: bool = schema.flag(False)

    def __post_init__(self):
        schema.check_fields(self)
        if self.bits is not None:
            checked_options(
                self.bits, self.format, self.group_size, self.activation_bits, 32,
                self.include_head, calibrated=False,
            )  # fmt: skip
        elif any(getattr(self, item.name) != item.default for item in dataclasses.fields(self)):
            raise AdapterError("base.bits: got None, allowed: 8 or 4 beside other settings")


@dataclass(frozen=True)
class DataConfig:
    """What a causal language model is trained on.

    Attributes:
        train: text files (one document each) or `.jsonl` files (one document a line).
        eval: files of the same kinds that are held out; none means no evaluation.
        text_column: the column of a `.jsonl` file that holds the text.
        sequence_length: tokens per example.
    """

    SECTION: ClassVar[str] = "data"

    train: list[str] = schema.texts(1)
    eval: list[str] = schema.texts(0, default_factory=list)
    text_column: str = schema.text(default="text")
    sequence_length: int = schema.integer(2, 512)

    def __post_init__(self):
        schema.check_fields(self)
        schema.expand_home(self, "train", "eval")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    The default learning rate is a cautious one for an adapter; docs/user-guide.md says when to take
    a larger one. A whole model wants a smaller one.

    Attributes:
        output_dir: where the adapter (or the whole model) and the checkpoints go.
        batch_size: examples per device and forward pass.
        accumulation: forward passes per optimizer step.
        learning_rate: the highest of the schedule.
        schedule: how the learning rate goes on after warming up.
        warmup: share of all steps in which the learning rate rises from 0.
        epochs: passes over the data, unless `max_steps` is given.
        max_steps: optimizer steps.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are clipped to this norm; 0 means never.
        precision: see `artemis.training.loading.resolve_precision`.
        checkpointing: recompute activations in the backward pass, for less memory.
        compile: run the model under `torch.compile`, which takes up to minutes at the start.
        cuda_graphs: replay steps as CUDA graphs, which launch at once (`graphs`).
        seed: of the adapter's start, the order of the data and dropout.
        logging_steps: optimizer steps between two reports of the loss.
        eval_steps: optimizer steps between two evaluations; None evaluates at the end only.
        save_steps: optimizer steps between two checkpoints; None saves the result only.
        save_total_limit: checkpoints that are kept; None keeps all.
    """

    SECTION: ClassVar[str] = "training"

    output_dir: str = schema.text(default="artemis-output")
    batch_size: int = schema.integer(1, 8)
    accumulation: int = schema.integer(1, 1)
    learning_rate: float = schema.number(lambda rate: rate > 0, "a number above 0", 5e-4)
    schedule: str = schema.choice("cosine", "linear", "constant", default="cosine")
    warmup: float = schema.number(lambda share: 0 <= share < 1, "a number in [0, 1)", 0.03)
    epochs: float = schema.number(lambda passes: passes > 0, "a number above 0", 1.0)
    max_steps: int | None = schema.optional_integer(1)
    weight_decay: float = schema.number(lambda decay: decay >= 0, "a number from 0", 0.0)
    max_grad_norm: float = schema.number(lambda norm: norm >= 0, "a number from 0", 1.0)
    precision: str = schema.choice(*PRECISIONS, default="auto")
    checkpointing: bool = schema.flag(False)
    compile: bool = schema.flag(False)
    cuda_graphs: bool = schema.flag(False)
    seed: int = schema.integer(0, 0, MAX_SEED)
    logging_steps: int = schema.integer(1, 10)
    eval_steps: int | None = schema.optional_integer(1)
    save_steps: int | None = schema.optional_integer(1)
    save_total_limit: int | None = schema.optional_integer(1, 2)

    def __post_init__(self):
        schema.check_fields(self)
        schema.expand_home(self, "output_dir")  # which TrainingArguments does, too

    def arguments(self, autocast: bool = False) -> TrainingArguments:
        """The same settings for transformers' Trainer; but for `cuda_graphs`, our Trainer's own.

        Args:
            autocast: run products in bfloat16 over float32 weights, as training a whole model in
                bf16, or heads, needs it. A frozen base is loaded in bfloat16 instead.

        Raises:
            AdapterError: `compile` where there is no compiler.
        """
        if self.compile:
            require_compiler("training.compile")
        # transformers 5.23 renamed gradient checkpointing and warns about the old name.
        names = {item.name for item in dataclasses.fields(TrainingArguments)}
        prefix = "activation" if "activation_checkpointing" in names else "gradient"
        checkpointing = {
            f"{prefix}_checkpointing": self.checkpointing,
            f"{prefix}_checkpointing_kwargs": {"use_reentrant": False},
        }
        schedule = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        return TrainingArguments(
            output_dir=self.output_dir,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            learning_rate=self.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=self.warmup,
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=autocast,
            torch_compile=self.compile,
            use_cpu=default_device().type == "cpu",
            seed=self.seed,
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,  # which reports the mean of earlier losses for a NaN
            eval_strategy="steps" if self.eval_steps else "no",
            eval_steps=self.eval_steps,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            save_total_limit=self.save_total_limit,
            report_to="none",
            **checkpointing,
        )


@dataclass(frozen=True)
class RunConfig:
    """A whole training file."""

    model: str
    data: DataConfig
    base: BaseConfig
    hybrid_adapter: HybridAdapterConfig | None
    training: TrainingConfig

    def __post_init__(self):
        schema.expand_home(self, "model")

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter trains; else the whole model does."""
        return self.hybrid_adapter is not None and self.hybrid_adapter.enabled

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RunConfig":
        """Read a training file.

        Raises:
            FileNotFoundError: there is no such file.
            AdapterError: it is not YAML, or a key is given twice, or it or its value is not
                allowed; names the section and the key, what was given and what is allowed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"training file {str(path)!r} does not exist or is not a file")
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> "RunConfig":
        """Read the parsed training file; errors as in `from_yaml`."""
        sections = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise AdapterError(f"got {values!r}, allowed: the sections {', '.join(sections)}")
        schema.refuse_unknown_keys(values, sections)
        model = values.get("model")
        if not isinstance(model, str) or not model:
            raise AdapterError(f"model: got {model!r}, allowed: a local path or a name")
        if "data" not in values:
            raise AdapterError("data: not given, allowed: a mapping with `train` files")
        adapter = None
        if "hybrid_adapter" in values:
            if values["hybrid_adapter"] is None:
                raise AdapterError(
                    "hybrid_adapter: got nothing, allowed: settings, or {} for the defaults; leave"
                    " the section out to train the whole model"
                )
            adapter = HybridAdapterConfig.from_dict(values["hybrid_adapter"])
        base = schema.from_mapping(BaseConfig, values.get("base"))
        if base.bits is not None and (adapter is None or not adapter.enabled):
            raise AdapterError(
                f"base.bits: got {base.bits} without a hybrid_adapter, allowed: with one, over a"
                " frozen base"
            )
        data = schema.from_mapping(DataConfig, values["data"])
        training = schema.from_mapping(TrainingConfig, values.get("training"))
        if training.eval_steps is not None and not data.eval:
            raise AdapterError(
                f"training.eval_steps: got {training.eval_steps} without data.eval, allowed: with"
                " held-out files, or null"
            )
        return cls(model=model, data=data, base=base, hybrid_adapter=adapter, training=training)
