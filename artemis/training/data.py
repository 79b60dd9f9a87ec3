"""Text files into equal blocks of tokens for causal language modelling.

A `.jsonl` file (or `.JSONL`) holds one document per line, under one text column; any other file is
one document.
Documents are tokenized, joined (with the tokenizer's end-of-text token between them, where it has
one) and cut into blocks of equal length, so no batch carries padding.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import AdapterError, nearest


class TokenBlocks(Dataset):
    """Blocks of tokens, each an example whose labels are its own tokens.

    Args:
        blocks: (examples, length), an integer tensor of token ids.
    """

    def __init__(self, blocks: torch.Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.blocks[index].long()
        return {"input_ids": tokens, "labels": tokens}

    @property
    def tokens(self) -> int:
        """Tokens in all blocks together."""
        return self.blocks.numel()


def load_blocks(
    files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    text_column: str = "text",
) -> TokenBlocks:
    """Read, tokenize and cut text files.

    Raises:
        FileNotFoundError: a file does not exist.
        AdapterError: a file is not UTF-8 text or JSON lines with `text_column`, or all of them
            together hold less than one block.
    """
    paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"data file {str(path)!r} does not exist or is not a file")
    documents = (text for path in paths for text in read_documents(path, text_column))
    blocks = cut_blocks(documents, tokenizer, sequence_length)
    if not len(blocks):
        names = ", ".join(map(str, paths))
        raise AdapterError(
            f"{names}: the text is shorter than one sequence of {sequence_length} tokens"
        )
    return blocks


def read_documents(path: Path, text_column: str = "text") -> Iterator[str]:
    """The documents of one file (see the module's description)."""
    text = read_text(path)
    if path.suffix.lower() != ".jsonl":
        yield text
        return
    # Not splitlines(): JSON strings may hold other line separators unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _document(line, text_column, f"{path}:{number}")


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put before it.

    Raises:
        AdapterError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _document(line: str, text_column: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 1,000 brackets
        raise AdapterError(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise AdapterError(f"{place}: expected a JSON object, got {type(record).__name__}")
    if text_column not in record:
        hint = nearest(text_column, record)
        raise AdapterError(f"{place}: no column {text_column!r}, only {', '.join(record)}{hint}")
    if not isinstance(record[text_column], str):
        kind = type(record[text_column]).__name__
        raise AdapterError(f"{place}: column {text_column!r} must be a string, got {kind}")
    try:
        record[text_column].encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a character, which is no text
        half = f"\\u{ord(record[text_column][error.start]):04x}"
        raise AdapterError(
            f"{place}: column {text_column!r} holds half of a surrogate pair, {half}"
        ) from None
    return record[text_column]


def cut_blocks(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> TokenBlocks:
    """Tokenize documents and cut them into blocks; what does not fill a block at the end is left.

    Shows a progress bar where standard error is a terminal.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for text in tqdm(documents, desc="tokenizing", unit=" documents", disable=None, leave=False):
        # verbose=False: a document longer than the model's context is expected here.
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(tokens + separator, dtype=torch.int32))
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    count = len(stream) // sequence_length
    return TokenBlocks(stream[: count * sequence_length].view(count, sequence_length))
