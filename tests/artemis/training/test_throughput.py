"""Tokens per second: of the tokens that the model saw."""

from itertools import accumulate

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from artemis.training import Trainer, tokens_per_second
from artemis.training.throughput import examples_trained
from tests.artemis.training.kit import LENGTH, blocks, hybrid, settings


def seen_tokens(model) -> list[int]:
    """Filled by the model's forward as it trains."""
    counts = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("examples", [1, 4, 5, 7])
def test_only_what_was_trained_is_counted(tmp_path, examples, accumulation):
    model = hybrid()
    counts = seen_tokens(model)
    arguments = settings(tmp_path, max_steps=7, accumulation=accumulation).arguments()
    trainer = Trainer(model, arguments, train_dataset=blocks(examples))
    output = trainer.train()
    seen = tokens_per_second(trainer, output) * output.metrics["train_runtime"]
    assert seen == pytest.approx(sum(counts))


def test_a_resumed_run_counts_its_own_steps(tmp_path):
    arguments = settings(tmp_path, save_steps=4, save_total_limit=None).arguments()
    Trainer(hybrid(), arguments, train_dataset=blocks(5)).train()
    model = hybrid()
    counts = seen_tokens(model)
    trainer = Trainer(model, arguments, train_dataset=blocks(5))
    output = trainer.train(str(tmp_path / "checkpoint-4"))
    seen = tokens_per_second(trainer, output, 4) * output.metrics["train_runtime"]
    assert seen == pytest.approx(sum(counts)) == pytest.approx(3 * LENGTH)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("examples", [1, 2, 4, 6, 7, 12, 13])
def test_what_processes_share_out(examples, processes):
    """As accelerate shares the batches of an epoch out, which the trainer has it do."""
    sampler = BatchSampler(range(examples), 2, drop_last=False)
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    together = [sum(map(len, batches)) for batches in zip(*shards, strict=True)]
    for accumulation in (1, 2, 3):
        epoch = [
            sum(together[start : start + accumulation])
            for start in range(0, len(together), accumulation)
        ]
        for step, seen in enumerate(accumulate(epoch * 3), start=1):
            assert examples_trained(step, examples, 2, accumulation, processes) == seen
