"""A few batches of whatever holds the data; the same ones every time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from .errors import AdapterError

Batch = Mapping[str, Any]
#: One thing, although some of them can be indexed or iterated over.
_SINGLE = (Mapping, str, torch.Tensor)


def batches_of(
    dataset: Iterable[Any],
    count: int,
    batch_size: int,
    collate: Callable | None,
    name: str = "dataset",
) -> Iterator[Batch]:
    """Yield up to `count` batches: mappings of the model's arguments.

    A list or tuple, and anything that only iterates (a DataLoader, a generator), holds batches
    already. A map-style dataset, and a list of mappings whose `input_ids` are one row, holds
    examples: `count * batch_size` of them, drawn without replacement from a seed of their own, are
    collated (by transformers' default collator unless `collate` is given).

    `name` is what the caller's argument is called. Raises `AdapterError` for anything else.
    """
    for batch in islice(_source(dataset, count, batch_size, collate, name), count):
        if not isinstance(batch, Mapping):
            raise AdapterError(
                f"{name}: got a {type(batch).__name__} as a batch, allowed: a mapping of the"
                " model's arguments"
            )
        if isinstance(batch.get("input_ids"), (list, tuple)):
            raise AdapterError(
                f"{name}: the input_ids of a batch are a {type(batch['input_ids']).__name__},"
                " allowed: a tensor, as return_tensors='pt' has a tokenizer give"
            )
        yield batch


def _source(
    dataset: Iterable[Any], count: int, batch_size: int, collate: Callable | None, name: str
) -> Iterable[Any]:
    if _holds_examples(dataset):
        return _examples(dataset, count, batch_size, collate or partial(_collated, name))
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size, collate_fn=collate or partial(_collated, name))
    if isinstance(dataset, _SINGLE) or not isinstance(dataset, Iterable):
        raise AdapterError(
            f"{name}: got a {type(dataset).__name__}, allowed: a list of batches, a dataset of"
            " examples, or a DataLoader"
        )
    return dataset


def _holds_examples(dataset: Iterable[Any]) -> bool:
    if isinstance(dataset, (list, tuple)):
        return bool(dataset) and _is_example(dataset[0])
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return indexed and not isinstance(dataset, (*_SINGLE, DataLoader))


def _is_example(item: Any) -> bool:
    """Whether `item` has one row of token ids; those of a batch are rows in a tensor."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    if isinstance(ids, (list, tuple)):
        return all(isinstance(token, int) for token in ids)
    return getattr(ids, "ndim", None) == 1


def _examples(dataset: Sequence, count: int, batch_size: int, collate: Callable) -> Iterator[Batch]:
    """Draw at random, since datasets may be sorted; spread what there is over `count` batches."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    size = max(1, min(batch_size, len(dataset) // count))
    for start in range(0, len(order), size):
        yield collate([dataset[i] for i in order[start : start + size]])


def _collated(name: str, examples: list) -> Batch:
    """By transformers' default collator; what it cannot join is one error."""
    try:
        return default_data_collator(examples)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{name}: examples that make no batch ({error}), allowed: mappings of the model's"
            " arguments, of one length in all of them, or batches"
        ) from error


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a batch."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
