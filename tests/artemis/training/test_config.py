"""The training file: what it takes, and what it says about what it does not take."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from artemis import AdapterError, HybridAdapterConfig
from artemis.training import BaseConfig, DataConfig, RunConfig, TrainingConfig, compiling

EXAMPLES = Path(__file__).parents[3] / "examples"
MINIMAL = {"model": "base", "data": {"train": "text.txt"}}


def test_the_example_is_complete_and_loads():
    values = yaml.safe_load((EXAMPLES / "train.yaml").read_text())
    config = RunConfig.from_yaml(EXAMPLES / "train.yaml")
    assert set(values) == {field.name for field in fields(RunConfig)}
    assert set(values["base"]) == {field.name for field in fields(BaseConfig)}
    assert config.base == BaseConfig()
    assert set(values["data"]) == {field.name for field in fields(DataConfig)}
    assert set(values["training"]) == {field.name for field in fields(TrainingConfig)}
    assert config.training.learning_rate == 1e-3
    assert config.hybrid_adapter == HybridAdapterConfig(adapter_dropout=0.1, fuse_model=True)


def test_defaults_that_the_example_states():
    stated = {}
    for line in (EXAMPLES / "train.yaml").read_text().partition("\ntraining:")[2].splitlines():
        key, _, comment = line.strip().partition(":")
        if "(default)" in comment:
            stated[key] = yaml.safe_load(line)[key]
    assert len(stated) >= 5
    assert {key: getattr(TrainingConfig(), key) for key in stated} == stated


def test_the_adapter_example_is_the_demos():
    import artemis.cli.demo.recipe as demo

    assert (EXAMPLES / "hybrid_adapter.yaml").read_text() == demo.ADAPTER_YAML.read_text()
    assert HybridAdapterConfig.from_yaml(demo.ADAPTER_YAML) == HybridAdapterConfig()


def test_the_adapter_reads_its_section_of_a_training_file():
    whole = RunConfig.from_yaml(EXAMPLES / "train.yaml")
    assert HybridAdapterConfig.from_yaml(EXAMPLES / "train.yaml") == whole.hybrid_adapter


def test_without_an_adapter_section_there_is_none():
    config = RunConfig.from_dict(MINIMAL)
    assert config.hybrid_adapter is None
    assert config.data.train == ["text.txt"]
    assert config.training == TrainingConfig()


def test_an_empty_adapter_section_does_not_train_the_whole_model():
    text = "model: m\ndata: {train: a.txt}\nhybrid_adapter:"
    with pytest.raises(AdapterError, match="hybrid_adapter: got nothing, allowed: settings, or {}"):
        RunConfig.from_dict(yaml.safe_load(text))
    text += " {}"
    assert RunConfig.from_dict(yaml.safe_load(text)).hybrid_adapter == HybridAdapterConfig()


def test_scientific_notation_is_a_number():
    text = "model: m\ndata: {train: a.txt}\ntraining: {learning_rate: 1e-4, weight_decay: 1E-2}"
    training = RunConfig.from_dict(yaml.safe_load(text)).training
    assert (training.learning_rate, training.weight_decay) == (1e-4, 1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"model": None}, "model: got None, allowed: a local path or a name"),
        ({"data": None}, "data.train: not given, allowed: a list of at least 1 text"),
        ({"data": {"trian": "a"}}, "data: unknown key 'trian'; did you mean 'train'"),
        ({"data": {"train": []}}, r"data.train: got \[\], allowed: a list of at least 1 text"),
        ({"data": {"train": [3]}}, r"data.train: got \[3\]"),
        ({"data": ["a.txt"]}, r"data: got \['a.txt'\], allowed: a mapping"),
        ({"data": {"train": "a", "sequence_length": 1}}, "data.sequence_length: got 1"),
        ({"training": {"batchsize": 4}}, "training: unknown key 'batchsize'; did you mean"),
        ({"training": {"batch_size": 0}}, "training.batch_size: got 0, allowed: an integer from 1"),
        ({"training": {"batch_size": 1.5}}, "training.batch_size: got 1.5"),
        ({"training": {"seed": 2**32}}, "seed: got 4294967296, allowed: .* from 0 to 4294967295"),
        ({"training": {"batch_size": True}}, "training.batch_size: got True"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: got 0, allowed: a number ab"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: got 'fast'"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: got nan"),
        ({"training": {"learning_rate": 10**400}}, "training.learning_rate: got 1000"),
        ({"training": {"warmup": 1.0}}, r"training.warmup: got 1.0, allowed: a number in \[0, 1\)"),
        ({"training": {"precision": "fp16"}}, "allowed: one of auto, fp32, bf16"),
        (
            {"training": {"checkpointing": "yes"}},
            "training.checkpointing: got 'yes'",
        ),
        ({"training": {"save_steps": 0}}, "allowed: an integer from 1, or null"),
        ({"training": {"eval_steps": 9}}, "training.eval_steps: got 9 without data.eval, allowed"),
        ({"hybrid_adapter": False}, "hybrid_adapter: got False, allowed: a mapping"),
        ({"hybrid_adapter": {"lora_rnak": 8}}, "hybrid_adapter: unknown key 'lora_rnak'"),
        ({"hybrid_adapter": {"lora_rank": 0}}, "hybrid_adapter.lora_rank: got 0"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(AdapterError, match=message):
        RunConfig.from_dict(MINIMAL | change)


@pytest.mark.parametrize("content", ["", "- a\n- b", "just text"])
def test_a_file_without_sections_says_which_there_are(tmp_path, content):
    path = tmp_path / "train.yaml"
    path.write_text(content)
    with pytest.raises(AdapterError, match="train.yaml: got .*sections model, data"):
        RunConfig.from_yaml(path)


def test_a_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("model: [")
    with pytest.raises(AdapterError, match="train.yaml: not valid YAML") as error:
        RunConfig.from_yaml(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: a\ndata: {train: b}\nmodel: c\n", "line 3: the key 'model' .* after line 1"),
        ("data:\n  train: a\n  'train': b\n", "line 3: the key 'train' .* after line 2"),
        ("data: {train: a, train: b}", "line 1: the key 'train' is given a second time"),
        ("x: {a: 1}\n? [1]\n: {b: 1, b: 2}", "line 3: the key 'b'"),
    ],
)
def test_a_key_that_is_given_twice(tmp_path, text, message):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(AdapterError, match=f"train.yaml: not valid YAML: {message}"):
        RunConfig.from_yaml(path)
    with pytest.raises(AdapterError, match=message):
        HybridAdapterConfig.from_yaml(path)


@pytest.mark.parametrize("value", ["2024-02-30", "0x_", "!!int seven"])
def test_a_value_that_is_not_what_it_looks_like(tmp_path, value):
    path = tmp_path / "train.yaml"
    path.write_text(f"data: {{train: a}}\nmodel: {value}\n")
    with pytest.raises(AdapterError, match="train.yaml: not valid YAML: line 2: "):
        RunConfig.from_yaml(path)


def test_a_path_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    """As `TrainingArguments` reads one: what is looked for must lie where it writes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = RunConfig.from_dict(
        {
            "model": "~/base",
            "data": {"train": "~/a.txt", "eval": ["b.txt", "~/c.txt"]},
            "training": {"output_dir": "~/out"},
        }
    )
    assert config.model == str(tmp_path / "base")
    assert config.data.train == [str(tmp_path / "a.txt")]
    assert config.data.eval == ["b.txt", str(tmp_path / "c.txt")]
    assert config.training.output_dir == config.training.arguments().output_dir
    assert config.training.output_dir == str(tmp_path / "out")


def test_a_merged_key_may_be_overridden(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        "model: m\ndata: {train: a}\n"
        "hybrid_adapter: &first\n  <<: {lora_rank: 2, adapter_size: 3}\n  lora_rank: 4\n"
        "training: {seed: 3}\n"
    )
    adapter = RunConfig.from_yaml(path).hybrid_adapter
    assert (adapter.lora_rank, adapter.adapter_size) == (4, 3)
    path.write_text(
        "a:\n  b: &inner {<<: &rank {lora_rank: 2}, lora_rank: 4}\n"
        "hybrid_adapter: {<<: *inner, <<: {adapter_size: 3}}\n"
    )
    adapter = HybridAdapterConfig.from_yaml(path)
    assert (adapter.lora_rank, adapter.adapter_size) == (4, 3)


@pytest.mark.parametrize("read", [RunConfig.from_yaml, HybridAdapterConfig.from_yaml])
def test_a_file_that_is_not_utf8(tmp_path, read):
    path = tmp_path / "train.yaml"
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(AdapterError, match="train.yaml: not UTF-8 text .byte 10"):
        read(path)


def test_a_folder_is_not_said_to_be_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        RunConfig.from_yaml(tmp_path)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        RunConfig.from_yaml("absent.yaml")


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: False)
    assert not TrainingConfig().arguments().torch_compile
    with pytest.raises(AdapterError, match="^training.compile: torch.compile needs"):
        TrainingConfig(compile=True).arguments()


def test_arguments_carry_every_setting(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    config = TrainingConfig(
        output_dir="out",
        batch_size=3,
        accumulation=5,
        learning_rate=0.25,
        schedule="constant",
        warmup=0.5,
        epochs=2.5,
        max_steps=7,
        weight_decay=0.125,
        max_grad_norm=0.75,
        checkpointing=True,
        compile=True,
        seed=11,
        logging_steps=13,
        eval_steps=17,
        save_steps=19,
        save_total_limit=23,
    )
    arguments = config.arguments()
    checkpointing = (
        arguments.activation_checkpointing
        if hasattr(arguments, "activation_checkpointing")
        else arguments.gradient_checkpointing
    )
    assert checkpointing
    assert arguments.torch_compile
    assert arguments.output_dir == "out"
    assert arguments.per_device_train_batch_size == arguments.per_device_eval_batch_size == 3
    assert arguments.gradient_accumulation_steps == 5
    assert arguments.learning_rate == 0.25
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.get_warmup_steps(40) == 20
    assert (arguments.num_train_epochs, arguments.max_steps) == (2.5, 7)
    assert (arguments.weight_decay, arguments.max_grad_norm) == (0.125, 0.75)
    assert (arguments.seed, arguments.logging_steps) == (11, 13)
    assert not arguments.logging_nan_inf_filter
    assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", 17)
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 19)
    assert arguments.save_total_limit == 23
    assert not arguments.bf16
    assert config.arguments(autocast=True).bf16
