"""Labelled text files as tokenized examples, and their batches."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...errors import AdapterError, listed

Batch = dict[str, torch.Tensor]
ENDINGS = (".train.jsonl", ".test.jsonl")
#: Examples are sorted by length within pools of so many batches: little padding, still random.
_POOL = 16


@dataclass(frozen=True)
class Examples:
    """Token ids of each text, int64 labels [examples], and their places in the file."""

    tokens: Sequence[list[int]]
    labels: torch.Tensor
    places: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: torch.Tensor) -> "Examples":
        tokens = [self.tokens[i] for i in indices.tolist()]
        return Examples(tokens, self.labels[indices], self.places[indices])

    def batch(self, indices: Sequence[int], pad: int) -> Batch:
        """The model's arguments for some examples, padded on the right to the longest."""
        rows = [torch.tensor(self.tokens[i]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(indices)]}

    def by_length(self) -> list[int]:
        return sorted(range(len(self)), key=lambda i: len(self.tokens[i]))


@dataclass(frozen=True)
class Task:
    """A data set: what to train on, what to test on, and how many classes it has."""

    name: str
    train: Examples
    test: Examples
    classes: int
    pad: int

    @property
    def fingerprint(self) -> str:
        """Of its tokens and labels."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(json.dumps([list(part.tokens), part.labels.tolist()]).encode())
        return digest.hexdigest()[:16]

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """The training examples without `held_out` of them, and these; the same at each call."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        return self.train.take(order[held_out:]), self.train.take(order[:held_out])


def random_batches(examples: Examples, size: int, seed: int, pad: int) -> list[Batch]:
    """Every example once, in batches of like length, drawn from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(order[start : start + size * _POOL], key=lambda i: len(examples.tokens[i]))
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [examples.batch(batches[i], pad) for i in shuffled]


def named_pairs(files: Iterable[Path]) -> dict[str, tuple[Path, Path]]:
    """NAME -> its NAME.train.jsonl and NAME.test.jsonl; raises AdapterError where one is alone."""
    found: dict[str, dict[str, Path]] = {}
    for file in files:
        ending = next((e for e in ENDINGS if file.name.endswith(e)), None)
        if ending is None:
            raise AdapterError(
                f"--data: got {file}, allowed: files called NAME.train.jsonl and NAME.test.jsonl"
            )
        found.setdefault(file.name.removesuffix(ending), {})[ending] = file
    for name, parts in found.items():
        for ending in ENDINGS:
            if ending not in parts:
                raise AdapterError(f"--data: {name}{ending} is missing beside the other of the two")
    return {name: tuple(parts[ending] for ending in ENDINGS) for name, parts in found.items()}


def load_task(
    name: str, files: tuple[Path, Path], tokenizer: PreTrainedTokenizerBase, length: int
) -> Task:
    """Read and tokenize a training and a test file; texts are cut to `length` tokens.

    A line is `{"text": ..., "label": ...}`, the label an integer or a text.

    Raises:
        FileNotFoundError: a file does not exist.
        AdapterError: a line is none of these, or a test label does not occur in training.
    """
    train, test = (_records(file) for file in files)
    labels = sorted({label for _, label in train}, key=str)
    if len(labels) < 2:
        raise AdapterError(f"{files[0]}: got {len(labels)} labels, allowed: two or more")
    unknown = {label for _, label in test} - set(labels)
    if unknown:
        raise AdapterError(
            f"{files[1]}: label {listed(map(repr, unknown))}, which {files[0]} does not have"
        )
    numbers = {label: number for number, label in enumerate(labels)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    parts = [
        Examples(
            tokenizer([text for text, _ in part], truncation=True, max_length=length)["input_ids"],
            torch.tensor([numbers[label] for _, label in part]),
            torch.arange(len(part)),
        )
        for part in (train, test)
    ]
    return Task(name, *parts, len(labels), pad)


def _records(path: Path) -> list[tuple[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, label = record["text"], record["label"]
        except (ValueError, KeyError, TypeError):
            text = label = None
        if not isinstance(text, str) or not isinstance(label, (int, str)):
            raise AdapterError(
                f'{path}:{number}: got {line[:40]!r}, allowed: {{"text": a text, "label": an'
                " integer or a text}"
            )
        records.append((text, label))
    if not records:
        raise AdapterError(f"{path}: got an empty file, allowed: one example a line")
    return records
