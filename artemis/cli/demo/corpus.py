"""The demo's texts, taken from the Python that runs it, and its tokenizer."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from artemis.training.data import read_text

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "pydoc_data"})
HELD_OUT_EVERY = 10  # one document in ten is never trained on
PASSAGE = 3000  # characters


def byte_pairs(documents: Iterable[str] = (), merges: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, one token that ends a text, and so many merges of frequent pairs.

    `documents`: texts that the merges are learnt from; without merges a token is a byte.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if merges:
        trainer = trainers.BpeTrainer(
            vocab_size=len(vocabulary) + merges, initial_alphabet=alphabet,
            special_tokens=[END_OF_TEXT], show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def python_sources(characters: int) -> tuple[list[str], list[str]]:
    """About so many characters of the standard library's source: (training, held-out) documents."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])
    )
    # A stride of the whole list, so that a part of the library stands for all of it.
    size = sum(path.stat().st_size for path in files)
    stride = max(1, size // characters)
    return split([path.read_text(encoding="utf-8", errors="ignore") for path in files[::stride]])


def help_topics() -> tuple[list[str], list[str]]:
    """The language reference that `help()` shows, in English: (training, held-out) passages."""
    return split(passages("\n\n".join(topics[name] for name in sorted(topics))))


def text_file(path: Path) -> tuple[list[str], list[str]]:
    """A user's own text: (training, held-out) passages.

    Raises:
        AdapterError: the file is not UTF-8 text.
    """
    return split(passages(read_text(path)))


def passages(text: str) -> list[str]:
    """Cut a text between paragraphs into passages of about `PASSAGE` characters.

    A paragraph that stands in it several times (as in the help topics) is kept once: what is held
    out must not have been trained on.
    """
    runs: list[list[str]] = [[]]
    size = 0
    for paragraph in dict.fromkeys(text.split("\n\n")):
        if size >= PASSAGE:
            runs.append([])
            size = 0
        runs[-1].append(paragraph)
        size += len(paragraph) + 2
    return ["\n\n".join(run) for run in runs]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Every tenth document is held out."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [text for i, text in enumerate(documents) if (i + 1) % HELD_OUT_EVERY], held_out
