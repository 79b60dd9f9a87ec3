"""`cuda_graphs=True`: the same training, bit for bit, by steps that are recorded and replayed.

A CPU has no graphs. `Rerun` stands in for them: it reads at the addresses and writes to those that
a graph would, and a replay spoils what other graphs, with which it shares memory, have written.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, masking_utils

from artemis import AdapterError
from artemis.training import RankAllocationCallback, Trainer, TrainingConfig
from artemis.training.graphs import MAX_GRAPHS, StepGraphs, check_arguments
from artemis.training.masks import without_idle_masks
from tests.artemis.models import bert, enable_checkpointing, llama, tokens
from tests.artemis.training.kit import (
    GradientRecorder,
    Sentences,
    StopAfter,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
)

DROPOUT = dict(adapter_dropout=0.3, lora_dropout=0.3)


class Rerun:
    """Records a call by running it again at each replay."""

    def __init__(self, model):
        self.model, self.recorded, self.replays = model, [], 0

    def warm(self, call):
        return call()

    def record(self, call):
        generator = torch.get_rng_state()
        outcome = call()
        torch.set_rng_state(generator)  # a capture computes nothing
        addresses = self._addresses()

        def replay():
            assert self._addresses() == addresses, "the graph reads memory that is gone"
            self.replays += 1
            values = flat(call())
            for other in self.recorded:
                spoil(other)
            for written, value in zip(flat(outcome), values, strict=True):
                written.copy_(value)

        self.recorded.append(outcome)
        spoil(outcome)
        return outcome, replay

    def _addresses(self):
        return [p.data_ptr() for p in self.model.parameters() if p.requires_grad]


def flat(outcome) -> list[torch.Tensor]:
    loss, gradients = outcome
    return [loss, *(gradient for gradient in gradients if gradient is not None)]


def spoil(outcome) -> None:
    for written in flat(outcome):
        written.fill_(torch.nan)


class Lengths(Dataset):
    """Examples of as many lengths."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 64, (index + 4,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def run(model, directory, graphs: bool, data=None, callbacks=(), resume=None, **changes):
    """A trainer that has trained, and the recorders of its graphs."""
    arguments = changes.pop("arguments", {})
    args = settings(directory, **{"max_steps": None, "epochs": 3, **changes}).arguments(**arguments)
    more = {"eval_dataset": blocks(2)} if "eval_steps" in changes else {}
    trainer = Trainer(model, args, train_dataset=data or blocks(), callbacks=[*callbacks], **more)
    recorders: list[Rerun] = []
    if graphs:

        def recorder():
            recorders.append(Rerun(model))
            return recorders[-1]

        trainer.step_graphs = StepGraphs(recorder)
    trainer.train(resume)
    return trainer, recorders


def both(make, directory, more_callbacks=lambda: (), **changes):
    """Train twice, without graphs and with; the latter's recorders, all else held equal."""
    results = []
    for graphs in (False, True):
        model, gradients = make(), GradientRecorder()
        callbacks = [gradients, *more_callbacks()]
        place = directory / str(graphs)
        trainer, recorders = run(model, place, graphs, callbacks=callbacks, **changes)
        log = [{k: v for k, v in e.items() if "loss" in k} for e in trainer.state.log_history]
        results.append((trained_state(model), gradients.steps, log[:-1]))
    (state, gradients, log), (got_state, got_gradients, got_log) = results
    assert_equal_states(got_state, state)
    assert len(got_gradients) == len(gradients) > 0
    for got, expected in zip(got_gradients, gradients, strict=True):
        assert_equal_states(got, expected)
    assert got_log == log and any("loss" in entry for entry in log)
    return recorders


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="one"),
        pytest.param(dict(accumulation=3), id="accumulated"),
        pytest.param(dict(accumulation=3, max_grad_norm=0.05), id="clipped"),
        pytest.param(dict(data=blocks(11)), id="an-odd-batch"),
        pytest.param(dict(data=blocks(11), accumulation=4), id="an-odd-batch-accumulated"),
        pytest.param(dict(arguments=dict(autocast=True)), id="autocast"),
    ],
)
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(dict(orthogonality_weight=0.1), id="shared-with-penalty"),
        pytest.param(dict(shared_parameters=False), id="own"),
    ],
)
def test_training_is_the_same(tmp_path, adapter, changes):
    (recorder,) = both(lambda: hybrid(**DROPOUT, **adapter), tmp_path, **changes)
    assert recorder.replays > 6


def test_a_whole_model_trains_the_same(tmp_path):
    def whole():
        torch.manual_seed(0)
        return llama(tie_word_embeddings=True)

    (recorder,) = both(whole, tmp_path, accumulation=2, data=blocks(12), learning_rate=1e-3)
    assert recorder.replays > 6


def test_a_loss_that_is_a_mean_of_micro_batches(tmp_path):
    """The parent divides by their number, which is another for the last ones of an epoch."""

    def classifier():
        torch.manual_seed(0)
        return bert()

    (recorder,) = both(classifier, tmp_path, data=Sentences(), accumulation=3, learning_rate=1e-3)
    assert len(recorder.recorded) == 2


def test_evaluation_between_steps(tmp_path):
    both(lambda: hybrid(**DROPOUT), tmp_path, eval_steps=2)


def test_more_shapes_than_graphs(tmp_path):
    (recorder,) = both(hybrid, tmp_path, data=Lengths(MAX_GRAPHS + 2), batch_size=1, accumulation=4)
    assert len(recorder.recorded) == MAX_GRAPHS


def test_ranks_that_change(tmp_path):
    def reallocation():
        bounds = dict(min_rank=2, max_rank=8)
        analysis = dict(batches=2, batch_size=4)
        return [RankAllocationCallback(blocks(), 4, analysis=analysis, allocation=bounds)]

    recorders = both(lambda: hybrid(**DROPOUT), tmp_path, reallocation)
    assert [len(recorder.recorded) for recorder in recorders] == [1, 1, 1]


class Change(TrainerCallback):
    """Does something to the model before the sixth step."""

    def __init__(self, change):
        self.change = change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            self.change(model)


def no_dropout(model):
    model.hybrid_adapter.lora_dropout.p = 0.0


def frozen_head(model):
    model.lm_head.requires_grad_(False)


@pytest.mark.parametrize(
    "make, change",
    [(lambda: hybrid(**DROPOUT), no_dropout), (lambda: llama(), frozen_head)],
    ids=["dropout", "frozen"],
)
def test_what_a_callback_changes(tmp_path, make, change):
    def seeded():
        torch.manual_seed(0)
        return make()

    recorders = both(seeded, tmp_path, lambda: [Change(change)])
    assert [len(recorder.recorded) for recorder in recorders] == [1, 1]


def test_a_resumed_run_equals_an_uninterrupted_one_without(tmp_path):
    expected, model, resumed = (hybrid(**DROPOUT) for _ in range(3))
    run(expected, tmp_path / "whole", graphs=False, accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", True, accumulation=2, save_steps=3, callbacks=[StopAfter(4)])
    _, recorders = run(resumed, tmp_path / "cut", True, accumulation=2, save_steps=3, resume=True)
    assert recorders[0].replays
    assert_equal_states(trained_state(resumed), trained_state(expected))


def test_gradients_that_a_parameter_keeps_are_its_own():
    """Without `zero_grad` they add up, eager steps in between."""
    weight = torch.nn.Linear(3, 1, bias=False)

    def step(inputs, items):
        loss = weight(inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    graphs, total = StepGraphs(lambda: Rerun(weight)), torch.zeros(1, 3)
    losses = []
    for number in range(7):
        x = torch.full((3 if number == 4 else 2, 3), float(number))
        losses.append((graphs.step(step, weight, {"x": x}, None), weight(x).sum()))
        total += x.sum(0)
        assert torch.equal(weight.weight.grad, total)
    assert all(torch.equal(got, expected) for got, expected in losses)


# --- what cannot be captured


class Refuses(Rerun):
    def record(self, call):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error") from None


def test_a_step_that_waits_for_the_gpu(tmp_path):
    model = hybrid()
    trainer = Trainer(model, settings(tmp_path).arguments(), train_dataset=blocks())
    trainer.step_graphs = StepGraphs(lambda: Refuses(model))
    message = r"cuda_graphs: got True, .*\(operation not permitted when stream is capturing\), all"
    with pytest.raises(AdapterError, match=message) as caught:
        trainer.train()
    assert "not permitted" in str(caught.value.__cause__)


def test_memory_that_runs_out_is_told_as_such(tmp_path):
    class Full(Rerun):
        def record(self, call):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model = hybrid()
    trainer = Trainer(model, settings(tmp_path).arguments(), train_dataset=blocks())
    trainer.step_graphs = StepGraphs(lambda: Full(model))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_a_batch_that_holds_more_than_tensors():
    graphs = StepGraphs(lambda: Rerun(torch.nn.Linear(1, 1)))
    with pytest.raises(AdapterError, match="a batch whose pixels is a list, allowed: tensors, num"):
        graphs.step(lambda inputs, items: None, torch.nn.Linear(1, 1), {"pixels": []}, None)


def test_a_cpu_is_refused(tmp_path):
    arguments = settings(tmp_path).arguments()
    with pytest.raises(AdapterError, match="cuda_graphs: got True on the device cpu, allowed: in"):
        Trainer(hybrid(), arguments, cuda_graphs=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(world_size=2), "in 2 processes"),
        (vars(TrainingConfig(checkpointing=True).arguments()), "with activation checkpointing"),
        (dict(fp16=True), "with fp16=True"),
        (dict(torch_compile=True), "with torch_compile=True"),
        (dict(optim="lomo"), "with optim=lomo"),
        (dict(optim="galore_adamw_layerwise"), "with optim=galore_adamw_layerwise"),
        (dict(torch_empty_cache_steps=4), "with torch_empty_cache_steps"),
    ],
)
def test_arguments_that_are_refused(change, message):
    usual = vars(TrainingConfig().arguments()) | dict(device=torch.device("cuda"), world_size=1)
    check_arguments(SimpleNamespace(**usual))
    with pytest.raises(AdapterError, match=f"^cuda_graphs: got True {message}, allowed"):
        check_arguments(SimpleNamespace(**usual | change))


@pytest.mark.parametrize(
    "change, message",
    [
        (enable_checkpointing, "activation checkpointing"),
        (lambda model: model.model.compile(backend="eager"), "a model under torch.compile"),
    ],
)
def test_models_that_are_refused(tmp_path, change, message):
    model = hybrid()
    change(model)
    before = trained_state(model)
    trainer = Trainer(model, settings(tmp_path).arguments(), train_dataset=blocks())
    trainer.step_graphs = StepGraphs(lambda: Rerun(model))
    with pytest.raises(AdapterError, match=f"^cuda_graphs: got True with {message}, allowed"):
        trainer.train()
    assert_equal_states(trained_state(model), before)


# --- the mask


@pytest.mark.parametrize(
    "brings, causal",
    [
        ({}, True),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 2)}, False),
        ({"attention_mask": torch.ones(2, 9, dtype=torch.int64)}, False),
    ],
    ids=["tokens", "positions", "mask"],
)
def test_attention_in_a_capture(monkeypatch, brings, causal):
    """As outside of one, causal without a mask, unless the batch brings what cannot be read."""
    masks, usual = [], torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask is None, is_causal))
        return usual(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    def tracing(tensor=None):
        return True

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(masking_utils, "is_tracing", tracing)
    model, before = llama(use_cache=False), dict(vars(masking_utils))
    inputs = {"input_ids": tokens()} | brings
    with without_idle_masks(inputs):
        model(**inputs)
    assert set(masks) == {(causal, causal)}
    assert vars(masking_utils) == before and masking_utils.is_tracing is tracing
