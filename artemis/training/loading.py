"""A model with its tokenizer, in the precision that suits the device."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import artemis_kernels

from ..errors import AdapterError
from ..layers.packed import packed_modules, sample_of
from ..quantization import load_quantized
from ..quantization.store import holds_base, read_stored

PRECISIONS = ("auto", "fp32", "bf16")
_SHORT = 256  # tokens; see `attention_for`


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype that matrix products run in.

    `auto` is bfloat16 where the device multiplies it faster than float32 (GPUs; CPUs with bf16 dot
    products), else float32. A frozen base is held in this dtype and its adapter in float32; a model
    that is trained whole keeps float32 weights and runs under autocast.
    """
    if precision == "auto":
        fast = artemis_kernels.has_fast_bf16(device or default_device())
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def attention_for(dtype: torch.dtype, device: torch.device, sequence_length: int | None) -> str:
    """The attention implementation that trains fastest: "sdpa", or "eager" in one case.

    torch's fused attention has a slow bf16 backward on a CPU: up to 256 tokens a sequence the plain
    form is faster there, beyond it is slower (docs/benchmarks.md, Attention). `sequence_length`
    None: not known.
    """
    short = sequence_length is not None and sequence_length <= _SHORT
    return "eager" if dtype == torch.bfloat16 and device.type == "cpu" and short else "sdpa"


def load_base(
    name: str, dtype: torch.dtype, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder or by name.

    A folder may be one that `save_quantized` wrote; then the tokenizer is the folder's, or that of
    the model it was made from. `attention` as transformers takes it; "sdpa" and None leave the
    choice to transformers: sdpa in a model that has it, else eager.

    Raises:
        AdapterError: there is no such model, it is damaged, or it is not a causal language model.
    """
    if attention == "sdpa":
        attention = None  # by its name transformers raises where the model has none
    # from_pretrained reports a missing model as OSError, an unsuitable one as ValueError, one whose
    # format needs another package as ImportError, in several lines, of which the first says what
    # is wrong; weights that were cut short are safetensors' matter.
    try:
        if holds_base(name):
            return _load_quantized_base(Path(name), dtype, attention)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise AdapterError(f"cannot load the model {name!r}: {reason}") from error
    return model, tokenizer


def _load_quantized_base(
    folder: Path, dtype: torch.dtype, attention: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    stored = read_stored(folder)
    if stored.config is None:
        raise AdapterError(f"{folder}: a {stored.class_name}, allowed: a transformers model")
    values = dict(stored.config)
    origin = values.get("_name_or_path")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = load_quantized(config, folder)
    _cast(model, dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    own = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder if own else origin or folder)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the weights in `dtype`.

    Buffers keep theirs: transformers makes them in float32 where bf16 would be too coarse (the
    frequencies of rotary embeddings). Of a packed weight its sample tells the dtype.
    """
    samples = [
        module.get_buffer(sample_of(name))
        for _, module in packed_modules(model)
        for name in module.packed_shapes()
    ]
    for tensor in (*model.parameters(), *samples):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
