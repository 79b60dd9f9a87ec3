"""Batches to measure importance on, from whatever holds the data; the same ones every time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from ..errors import AdapterError

Batch = Mapping[str, Any]


def batches_of(
    dataset: Iterable[Any], count: int, batch_size: int, collate: Callable | None
) -> Iterator[Batch]:
    """Yield up to `count` batches: mappings of the model's arguments.

    A list or tuple, and anything that only iterates (a DataLoader, a generator), holds batches
    already. A map-style dataset holds examples: `count * batch_size` of them, drawn without
    replacement from a seed of their own, are collated (by transformers' default collator unless
    `collate` is given).
    """
    for batch in islice(_source(dataset, count, batch_size, collate), count):
        if not isinstance(batch, Mapping):
            raise AdapterError(
                f"dataset: got a {type(batch).__name__} as a batch, allowed: a mapping of the"
                " model's arguments, labels included"
            )
        yield batch


def _source(
    dataset: Iterable[Any], count: int, batch_size: int, collate: Callable | None
) -> Iterable[Any]:
    holds_examples = (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, (list, tuple, Mapping, DataLoader))
    )
    if holds_examples:
        return _examples(dataset, count, batch_size, collate or default_data_collator)
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size, collate_fn=collate or default_data_collator)
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        raise AdapterError(
            f"dataset: got a {type(dataset).__name__}, allowed: a list of batches, a dataset of"
            " examples, or a DataLoader"
        )
    return dataset


def _examples(dataset: Sequence, count: int, batch_size: int, collate: Callable) -> Iterator[Batch]:
    """Draw at random, since datasets may be sorted; spread what there is over `count` batches."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    size = max(1, min(batch_size, len(dataset) // count))
    for start in range(0, len(order), size):
        yield collate([dataset[i] for i in order[start : start + size]])


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
