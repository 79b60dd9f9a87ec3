"""A resumed run sees the examples in the order of the run that was cut."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from artemis.training import Trainer
from tests.artemis.training.kit import (
    LENGTH,
    StopAfter,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
)


class Ragged(Dataset):
    """Examples of several lengths."""

    def __init__(self):
        self.examples = [block[: 3 + i % (LENGTH - 2)] for i, block in enumerate(blocks().blocks)]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return {"input_ids": self.examples[index], "labels": self.examples[index]}


class OneOfTwo(Trainer):
    """Trains on the batches that accelerate gives the first of two processes."""

    def get_train_dataloader(self):
        sampler = self._get_train_sampler()
        loader = DataLoader(self.train_dataset, sampler=sampler, collate_fn=default_data_collator)
        return prepare_data_loader(
            loader, num_processes=2, process_index=0, use_seedable_sampler=True
        )


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("kind", [Trainer, OneOfTwo])
def test_a_run_that_is_cut_in_its_second_pass_goes_on_in_its_order(tmp_path, kind, strategy):
    def trainer(folder):
        config = settings(
            tmp_path / folder, batch_size=1, max_steps=14, save_steps=1, save_total_limit=None
        )
        arguments = config.arguments()
        arguments.train_sampling_strategy = strategy
        # Dropout draws from the generator that transformers orders by.
        return kind(hybrid(adapter_dropout=0.3), arguments, train_dataset=Ragged())

    whole = trainer("whole")
    whole.train()
    steps_a_pass = round(whole.state.global_step / whole.state.epoch)
    cut = trainer("cut")
    cut.add_callback(StopAfter(steps_a_pass + 2))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer("cut")
    resumed.train(True)
    assert_equal_states(trained_state(resumed.model), trained_state(whole.model))


def test_each_pass_by_length_has_an_order_of_its_own(tmp_path):
    arguments = settings(tmp_path, batch_size=1).arguments()
    arguments.train_sampling_strategy = "group_by_length"
    orders = []
    for seed in (1, 2):
        sampler = Trainer(hybrid(), arguments, train_dataset=Ragged())._get_train_sampler()
        torch.manual_seed(seed)  # as another process may stand
        for number in (0, 1):
            sampler.set_epoch(number)
            orders.append(list(sampler))
    first, second, *again = orders
    assert again == [first, second] and first != second
    assert sorted(first) == sorted(second) == list(range(len(sampler)))
