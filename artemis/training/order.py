"""The order of the examples in a pass over the data: by the seed and the number of the pass alone.

So a resumed run goes on in the order that it began with, and processes share out the same one.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


def begin_pass(loader: Iterable, number: int) -> None:
    """Tell the sampler within `loader` which pass begins, whatever accelerate wraps it in.

    accelerate looks through one wrapper for a sampler that is not its own. Where several processes
    skip what a checkpoint has seen there are two, and the pass would be taken for the first.
    """
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None and not hasattr(sampler, "set_epoch"):
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    if sampler is not None:
        sampler.set_epoch(number)


class GroupedByLength(Sampler[int]):
    """transformers' sampler that groups examples by length, from a generator of its own.

    It would draw from torch's as that stands when a pass begins: after all dropout of the passes
    before, or in a resumed run, and in another process, after none or other.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, number: int) -> None:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + number)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)
