"""What the demo trains, and where it keeps things."""

import functools
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast

from artemis.training import TokenBlocks, TrainingConfig, cut_blocks

from . import corpus

ADAPTER_YAML = Path(__file__).with_name("hybrid_adapter.yaml")


@dataclass(frozen=True)
class Recipe:
    """Sizes, steps and learning rates; the defaults take four to five minutes on two CPU cores.

    Both learning rates were chosen by hand on this data: an adapter wants a larger one. Without
    `merges` of byte pairs a token is a byte.
    """

    hidden_size: int = 512
    intermediate_size: int = 1376
    layers: int = 3
    heads: int = 8
    sequence_length: int = 128
    batch_size: int = 8
    source_characters: int = 2_000_000
    merges: int = 0
    base_steps: int = 400
    base_rate: float = 1e-3
    adapt_steps: int = 160
    adapt_full_rate: float = 1e-3
    adapt_hybrid_rate: float = 5e-3
    held_out_blocks: int = 128

    def model_config(self, vocabulary: int, end_of_text: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4 * self.sequence_length,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )

    def training(self, output: Path, steps: int, rate: float) -> TrainingConfig:
        return TrainingConfig(
            output_dir=str(output),
            batch_size=self.batch_size,
            learning_rate=rate,
            max_steps=steps,
            warmup=0.05,
            logging_steps=max(1, steps // 5),
        )


QUICK = Recipe(
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    sequence_length=32,
    batch_size=4,
    source_characters=500_000,
    base_steps=4,
    adapt_steps=3,
    held_out_blocks=8,
)


@dataclass(frozen=True)
class Workspace:
    """The demo's folder and its texts: an old domain, source code, and a new one, English.

    Attributes:
        directory: holds `base/`, `full/`, `hybrid/`, `hybrid-int8/` and `results/`.
        recipe: what to train.
        text: the user's text for the new domain; None takes Python's help topics.
    """

    directory: Path
    recipe: Recipe
    text: Path | None = None

    @property
    def base(self) -> Path:
        return self.directory / "base"

    @property
    def base_recipe(self) -> Path:
        return self.base / "demo_recipe.json"

    def describe_base(self) -> dict:
        """All that the base model depends on; a base of another description is trained anew."""
        sizes = {name: value for name, value in asdict(self.recipe).items() if "adapt" not in name}
        return sizes | {"python": platform.python_version()}

    def base_is_ready(self) -> bool:
        if not self.base_recipe.is_file():
            return False
        return json.loads(self.base_recipe.read_text()) == self.describe_base()

    def documents(self, domain: str) -> tuple[list[str], list[str]]:
        """Texts of the domain "old" or "new": (training, held-out)."""
        if domain == "old":
            return corpus.python_sources(self.recipe.source_characters)
        return corpus.help_topics() if self.text is None else corpus.text_file(self.text)

    def training_data(self, domain: str) -> TokenBlocks:
        return self._blocks(self.documents(domain)[0])

    def held_out_data(self, domain: str) -> TokenBlocks:
        blocks = self._blocks(self.documents(domain)[1]).blocks
        return TokenBlocks(blocks[: self.recipe.held_out_blocks])

    def _blocks(self, documents: list[str]) -> TokenBlocks:
        return cut_blocks(documents, self.tokenizer(), self.recipe.sequence_length)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its byte pairs are those of the old domain."""
        return _tokenizer(self.recipe.source_characters, self.recipe.merges)


@functools.cache
def _tokenizer(source_characters: int, merges: int) -> PreTrainedTokenizerFast:
    texts = corpus.python_sources(source_characters)[0] if merges else ()
    return corpus.byte_pairs(texts, merges)
