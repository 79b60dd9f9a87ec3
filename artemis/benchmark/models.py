"""What is measured on: Llamas of known sizes with random weights, whole or a few layers of them.

Sizes of the named models are those of their published configurations; nothing is downloaded.
"""

import re
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..errors import AdapterError, nearest

HEAD_SIZE = 64
_SIZES = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama. `tied`: the head is the embedding's own tensor."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 4096
    heads: int | None = None  # None: of HEAD_SIZE
    key_value_heads: int | None = None  # None: as many as heads
    tied: bool = False

    def config(self, positions: int) -> LlamaConfig:
        heads = self.heads or self.hidden // HEAD_SIZE
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.key_value_heads or heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied,
            use_cache=False,
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear modules."""
        heads = self.heads or self.hidden // HEAD_SIZE
        key_value = self.hidden * (self.key_value_heads or heads) // heads
        return self.hidden * (2 * self.hidden + 2 * key_value + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """Weights of all linear modules and embeddings."""
        rows = self.vocabulary * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + rows * self.hidden


SMALL = {
    "512x8": Architecture(512, 1376, 8),
    "1024x6": Architecture(1024, 2816, 6),
    "2048x2": Architecture(2048, 5504, 2),
}
#: One layer as wide as those of Llama 2 7B, measured whole.
WIDE = {"4096x1": Architecture(4096, 11008, 1)}
LARGE = {
    "llama-3.2-1b": Architecture(2048, 8192, 16, 128256, 32, 8, tied=True),
    "llama-2-7b": Architecture(4096, 11008, 32, 32000, 32, 32),
    "llama-2-13b": Architecture(5120, 13824, 40, 32000, 40, 40),
    "llama-3-70b": Architecture(8192, 28672, 80, 128256, 64, 8),
}
MODELS = SMALL | WIDE | LARGE


def architecture(name: str) -> Architecture:
    """A named model, or `HIDDENxLAYERS` with the proportions and vocabulary of the small ones.

    Raises:
        AdapterError: neither, or a hidden size that is no multiple of 64.
    """
    if name in MODELS:
        return MODELS[name]
    sizes = _SIZES.fullmatch(name)
    if sizes is None:
        hint = nearest(name, MODELS)
        raise AdapterError(
            f"--models: got {name!r}, allowed: HIDDENxLAYERS or {', '.join(MODELS)}{hint}"
        )
    hidden, layers = int(sizes[1]), int(sizes[2])
    if not hidden or hidden % HEAD_SIZE or not layers:
        raise AdapterError(
            f"--models: got {name!r}, allowed: a hidden size in multiples of {HEAD_SIZE}, and"
            " layers from 1"
        )
    return Architecture(hidden, -(-hidden * 8 // 3 // 32) * 32, layers)


@dataclass(frozen=True)
class Cell:
    """A model, or some layers of it, and a batch of `batch` sequences of `sequence` tokens.

    `whole` models train as they are; in parts of one the input of the first layer requires a
    gradient, so that every layer costs what an inner one does.
    """

    model: str
    layers: int
    vocabulary: int
    batch: int
    sequence: int
    whole: bool

    @property
    def architecture(self) -> Architecture:
        return replace(architecture(self.model), layers=self.layers, vocabulary=self.vocabulary)

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def build(sizes: Architecture, dtype: torch.dtype, positions: int) -> PreTrainedModel:
    """A Llama of random weights in `dtype`, the same at each call, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        sizes.config(positions), dtype=dtype, attn_implementation="sdpa"
    )
    return model.train()


def random_tokens(vocabulary: int, batch: int, sequence: int) -> torch.Tensor:
    """Random tokens [batch, sequence], int64, the same at each call; on the CPU."""
    generator = torch.Generator().manual_seed(1)  # on the CPU, whatever the default device is
    return torch.randint(vocabulary, (batch, sequence), generator=generator, device="cpu")
