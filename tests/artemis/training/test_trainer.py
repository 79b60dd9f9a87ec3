"""What the trainer adds to transformers': late models, adapter-only saves, the penalty."""

import inspect
import re
import resource
import signal

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from artemis import AdapterError, load_hybrid_adapter, orthogonality_penalty, read_adapter
from artemis.cli.demo.corpus import byte_pairs
from artemis.training import Trainer, TrainingConfig
from tests.artemis.models import adapted, bert, llama, snapshot, t5
from tests.artemis.training.kit import (
    GradientRecorder,
    Sentences,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
    trainer_for,
)

BERT = dict(
    target_modules=["query", "key", "value", "intermediate.dense"],
    apply_lora_to=["query", "key", "value"],
)


def recorded_gradients(model, directory, **changes) -> dict[str, torch.Tensor]:
    """The gradients of the first optimizer step, unclipped."""
    trainer = trainer_for(model, directory, max_steps=1, max_grad_norm=0.0, **changes)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.steps[0]


# --- the model may come late


def test_train_takes_the_model(tmp_path):
    early = hybrid(adapter_dropout=0.2)
    trainer_for(early, tmp_path).train()
    late = hybrid(adapter_dropout=0.2)
    trainer = Trainer(args=settings(tmp_path).arguments(), train_dataset=blocks())
    output = trainer.train(late)
    assert output.global_step == 6
    assert trainer.model is late
    assert_equal_states(trained_state(late), trained_state(early))


def test_it_goes_with_a_trainer_that_takes_less(tmp_path):
    """Seq2SeqTrainer knows no `optimizer_cls_and_kwargs`."""

    class Sequences(Trainer, Seq2SeqTrainer):
        pass

    def model():
        set_seed(1)
        return adapted(t5(), target_modules=["q", "v", "wi"], apply_lora_to=["q", "v"])

    early, late = model(), model()
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none"
    )
    set_seed(1)
    Trainer(early, arguments, train_dataset=blocks()).train()
    set_seed(1)
    Sequences(args=arguments, train_dataset=blocks()).train(late)
    assert_equal_states(trained_state(late), trained_state(early))


def test_what_was_set_before_the_model_came_is_kept(tmp_path):
    class Seen(TrainerCallback):
        models = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.models.append(model)

    trainer = Trainer(args=settings(tmp_path).arguments())
    trainer.add_callback(Seen())
    trainer.train_dataset = blocks()
    model = hybrid()
    trainer.train(model)
    assert Seen.models == [model]


def loss_of_outputs(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


#: What may be given before the model, beside optimizers. Transformers' next argument fails below.
GIVEN = {
    "data_collator": lambda examples: transformers.default_data_collator(examples),
    "train_dataset": blocks(),
    "eval_dataset": blocks(2),
    "processing_class": byte_pairs(),
    "compute_loss_func": loss_of_outputs,
    "compute_metrics": lambda predicted: {},
    "callbacks": [TrainerCallback()],
    "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3}),
    "preprocess_logits_for_metrics": lambda logits, labels: logits,
}


@pytest.mark.parametrize(
    "name",
    sorted(
        inspect.signature(transformers.Trainer).parameters.keys()
        - {"model", "args", "model_init", "optimizers"}
    ),
)
def test_what_was_given_before_the_model_came_is_kept(tmp_path, name):
    given = {"train_dataset": blocks()} | {name: GIVEN[name]}
    trainer = Trainer(args=settings(tmp_path, max_steps=1).arguments(), **given)
    trainer.train(hybrid())
    if name == "callbacks":
        assert GIVEN[name][0] in trainer.callback_handler.callbacks
    else:
        assert getattr(trainer, name) is GIVEN[name]


def test_a_second_model_is_trained_and_the_first_left_alone(tmp_path):
    trainer = Trainer(args=settings(tmp_path).arguments(), train_dataset=blocks())
    first, second = hybrid(), hybrid()
    trainer.train(first)
    after_first = trained_state(first)
    trainer.train(second)
    assert_equal_states(trained_state(first), after_first)
    assert_equal_states(trained_state(second), after_first)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_given_optimizer_serves_the_late_model(tmp_path, scheduled):
    model = hybrid()
    before = trained_state(model)
    optimizer = torch.optim.SGD(
        [model.hybrid_adapter.get_parameter("gain.model/layers/0/mlp/up_proj")], 1.0
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    trainer = Trainer(
        args=settings(tmp_path).arguments(),
        train_dataset=blocks(),
        optimizers=(optimizer, constant if scheduled else None),
    )
    trainer.train(model)
    rates = {log["learning_rate"] for log in trainer.state.log_history if "loss" in log}
    assert (rates == {0.5}) == scheduled
    after = trained_state(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["hybrid_adapter.gain.model/layers/0/mlp/up_proj"]


def test_a_signal_that_asks_for_a_checkpoint_serves_the_late_model(tmp_path, monkeypatch):
    class AtOnce:
        """A timer that does not wait."""

        def __init__(self, seconds, function):
            self.start = function

    class Preempted(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("transformers.trainer_jit_checkpoint.threading.Timer", AtOnce)
    before = signal.getsignal(signal.SIGTERM)
    arguments = settings(tmp_path).arguments()
    arguments.enable_jit_checkpoint = True
    trainer = Trainer(args=arguments, train_dataset=blocks(), callbacks=[Preempted()])
    trainer.train(hybrid())
    assert trainer.state.global_step == 3
    assert read_adapter(tmp_path / "checkpoint-2").parameters
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_a_model_there_is_one_clear_error(tmp_path):
    trainer = Trainer(args=settings(tmp_path).arguments(), train_dataset=blocks())
    with pytest.raises(AdapterError, match="no model yet"):
        trainer.train()
    with pytest.raises(AdapterError, match="no model yet"):
        trainer.evaluate(blocks())
    with pytest.raises(AdapterError, match="no model yet"):
        trainer.save_model()
    assert list(tmp_path.iterdir()) == []


def test_default_arguments_are_those_of_the_training_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(train_dataset=blocks())
    assert trainer.args.learning_rate == TrainingConfig().learning_rate
    assert trainer.train(hybrid()).global_step == 1  # 8 examples, batches of 8, one epoch


def test_one_process_drives_one_gpu(tmp_path):
    arguments = settings(tmp_path).arguments()
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 4
    assert Trainer(hybrid(), arguments).args.n_gpu == 1


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharding_is_refused(tmp_path, engine):
    trainer = trainer_for(hybrid(), tmp_path)
    setattr(trainer, engine, True)
    with pytest.raises(AdapterError, match="cannot be sharded"):
        trainer.train()


def test_a_merged_adapter_is_not_trained(tmp_path):
    model = hybrid(target_modules=["q_proj"], apply_lora_to=["q_proj"])
    model.merge_adapter()
    before = snapshot(model)
    trainer = trainer_for(model, tmp_path)
    with pytest.raises(AdapterError, match="call unmerge_adapter"):
        trainer.train()
    assert_equal_states(snapshot(model), before)
    model.unmerge_adapter()
    trainer.train()


# --- what is saved


def test_a_checkpoint_holds_the_adapter_and_never_the_base(tmp_path):
    model = hybrid()
    trainer_for(model, tmp_path, save_steps=6).train()
    checkpoint = tmp_path / "checkpoint-6"
    assert {path.name for path in checkpoint.iterdir()} == {
        "hybrid_adapter.safetensors",
        "hybrid_adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    with safe_open(checkpoint / "hybrid_adapter.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert_equal_states(saved, trained_state(model))
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(saved)


class FullDisk(Trainer):
    """Saves where no file may be larger than `size`."""

    size: int

    def _save_checkpoint(self, *args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, before[1]))
        try:
            super()._save_checkpoint(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


# capsys: output is held in memory, where the limit does not count.
@pytest.mark.parametrize("build", [hybrid, llama])
def test_a_disk_that_is_full_at_any_file_is_an_error_that_says_where(tmp_path, capsys, build):
    arguments = settings(tmp_path / "whole", max_steps=1, save_steps=1).arguments()
    Trainer(build(), arguments, train_dataset=blocks()).train()
    files = list((tmp_path / "whole" / "checkpoint-1").iterdir())
    assert len(files) > 5
    for file in files:
        arguments = settings(tmp_path / file.name, max_steps=1, save_steps=1).arguments()
        trainer = FullDisk(build(), arguments, train_dataset=blocks())
        trainer.size = file.stat().st_size - 1
        where = re.escape(str(tmp_path / file.name / "checkpoint-1"))
        with pytest.raises(OSError, match=rf"^{where}\S*: not written"):
            trainer.train()
        with pytest.raises(AdapterError, match="no complete checkpoint"):
            trainer.train(True)


def test_the_base_is_not_changed_by_training(tmp_path):
    set_seed(1)
    before = snapshot(llama())
    model = hybrid()
    trainer_for(model, tmp_path).train()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    class Scripted(Trainer):
        """Evaluations say that step 2 was the best."""

        def evaluate(self, *args, **kwargs):
            loss = {1: 3.0, 2: 1.0, 3: 2.0}[self.state.global_step]
            metrics = {"eval_loss": loss}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    arguments = settings(
        tmp_path, max_steps=3, eval_steps=1, save_steps=1, save_total_limit=None
    ).arguments()
    arguments.load_best_model_at_end = True
    arguments.metric_for_best_model = "eval_loss"
    arguments.greater_is_better = False
    model = hybrid()
    Scripted(model, arguments, train_dataset=blocks(), eval_dataset=blocks()).train()
    set_seed(1)
    best = load_hybrid_adapter(llama(), tmp_path / "checkpoint-2")
    last = load_hybrid_adapter(_fresh_llama(), tmp_path / "checkpoint-3")
    best_state = dict(best.hybrid_adapter.state_dict())
    assert_equal_states(dict(model.hybrid_adapter.state_dict()), best_state)
    assert any(
        not torch.equal(tensor, best_state[name])
        for name, tensor in last.hybrid_adapter.state_dict().items()
    )


def _fresh_llama():
    set_seed(1)
    return llama()


def test_a_classification_head_trains_and_is_saved(tmp_path):
    set_seed(1)
    model = adapted(bert(), **BERT)
    head = model.classifier.weight.detach().clone()
    trainer = Trainer(model, settings(tmp_path).arguments(), train_dataset=Sentences())
    trainer.train()
    trainer.save_model()
    assert not torch.equal(model.classifier.weight, head)
    set_seed(1)
    loaded = load_hybrid_adapter(bert(), tmp_path)
    assert_equal_states(trained_state(loaded), trained_state(model))


# --- gradients


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_penalty_is_added_once_per_optimizer_step(tmp_path, accumulation):
    weight = 0.7
    changes = dict(batch_size=4 // accumulation, accumulation=accumulation)
    got = recorded_gradients(
        hybrid(adapter_dropout=0.0, orthogonality_weight=weight), tmp_path, **changes
    )
    task = recorded_gradients(hybrid(adapter_dropout=0.0), tmp_path, **changes)

    model = hybrid(orthogonality_weight=weight)
    (weight * orthogonality_penalty(model)).backward()
    assert got.keys() == task.keys()
    touched = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = task[name]
        if parameter.grad is not None:
            expected = expected + parameter.grad
            touched += 1
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-7)
    assert touched >= 4


def test_accumulation_equals_one_large_batch(tmp_path):
    model = dict(adapter_dropout=0.0, orthogonality_weight=0.7)
    whole = recorded_gradients(hybrid(**model), tmp_path, batch_size=8)
    parts = recorded_gradients(hybrid(**model), tmp_path, batch_size=2, accumulation=4)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_penalty_carries_the_loss_scale(tmp_path):
    """Under fp16 the gradients are scaled when the penalty is added."""
    model = hybrid(adapter_dropout=0.0, orthogonality_weight=0.7)
    expected = recorded_gradients(model, tmp_path)
    trainer = trainer_for(
        hybrid(adapter_dropout=0.0, orthogonality_weight=0.7),
        tmp_path,
        max_steps=1,
        max_grad_norm=0.0,
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    for name, gradient in recorder.steps[0].items():
        torch.testing.assert_close(gradient / 256.0, expected[name])


def test_penalty_is_reported(tmp_path):
    model = hybrid(orthogonality_weight=0.1)
    trainer = trainer_for(model, tmp_path, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]["orthogonality_penalty"]
    assert logged == pytest.approx(orthogonality_penalty(model).item())


def test_checkpointing_changes_nothing_but_memory(tmp_path):
    states = []
    for checkpointing in (False, True):
        model = hybrid(adapter_dropout=0.3, lora_dropout=0.3)
        trainer_for(model, tmp_path, checkpointing=checkpointing).train()
        states.append(trained_state(model))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_every_parameter_has_a_gradient_from_the_second_step(tmp_path):
    set_seed(1)
    model = adapted(llama(), fill=False)
    trainer = trainer_for(model, tmp_path, max_steps=2, warmup=0.0, checkpointing=True)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, grad in recorder.steps[1].items() if grad.any()} == names


def test_gains_and_biases_are_not_decayed(tmp_path):
    model = hybrid()
    decayed = trainer_for(model, tmp_path).get_decay_parameter_names(model)
    tables = {name.split(".")[1] for name in decayed if name.startswith("hybrid_adapter.")}
    assert tables == {"lora_a", "lora_b", "down", "up"}


# --- precision


def test_a_bf16_base_stays_and_its_adapter_learns_in_float32(tmp_path):
    set_seed(1)
    base = llama().to(torch.bfloat16)
    before = snapshot(base)
    model = adapted(base)
    start = trained_state(model)
    trainer_for(model, tmp_path).train()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name, tensor in trained_state(model).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, start[name])


def test_autocast_trains_float32_weights(tmp_path):
    model = llama()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    arguments = settings(tmp_path, max_steps=2).arguments(autocast=True)
    Trainer(model, arguments, train_dataset=blocks()).train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
