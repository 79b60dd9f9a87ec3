"""artemis bench quality on a tiny encoder: arms, what they share, resuming, refusals."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from artemis.benchmark.quality import arms, probe
from artemis.benchmark.quality.arms import ARMS, CORE, FAMILIES, hybrid_config, parameters_of
from artemis.benchmark.quality.data import Examples, load_task, random_batches
from artemis.benchmark.quality.model import Pretrained, outputs
from artemis.benchmark.quality.training import Recipe, train_and_test
from artemis.cli import main

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny encoder with its tokenizer, and a data set `toy` whose label one word decides."""
    directory = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory / "model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory / "model")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 120), ("test", 40)):
        with (directory / f"toy.{part}.jsonl").open("w") as file:
            for _ in range(count):
                length = int(torch.randint(3, 9, (), generator=generator))
                words = torch.randint(60, (length,), generator=generator).tolist()
                text = " ".join(WORDS[i] for i in words)
                print(json.dumps({"text": text, "label": int(words[0] < 30)}), file=file)
    return directory


def arguments(folder: Path, *more: str) -> list[str]:
    data = [str(folder / f"toy.{part}.jsonl") for part in ("train", "test")]
    return [
        "bench", "quality", "--model", str(folder / "model"), "--data", *data,
        "--precision", "fp32", "--batch", "8", "--examples", "48", *more,
    ]  # fmt: skip


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def toy(folder: Path):
    pretrained = Pretrained(folder / "model", torch.float32, 16)
    files = tuple(folder / f"toy.{part}.jsonl" for part in ("train", "test"))
    return pretrained, load_task("toy", files, pretrained.tokenizer(), 16)


# --- the whole


def test_core_is_measured_once_and_shown(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "quality.jsonl", tmp_path / "quality.png"
    wanted = arguments(folder, "--seeds", "2", "--resume", str(path), "--plot", str(picture))
    assert main(wanted) == 0
    table = capsys.readouterr().out
    found = Counter(record["kind"] for record in records(path))
    assert found == {"run": 1, "quality-trial": 16, "quality": 2 * len(CORE)}
    cells = [record for record in records(path) if record["kind"] == "quality"]
    for cell in cells:
        assert cell["accuracy"] == pytest.approx(1 - len(cell["wrong"]) / 40, abs=1e-5)
        assert cell["trained_on"] == 48
        assert cell["steps"] == (0 if cell["arm"] == "frozen" else 6)
        assert cell["arm"] == "frozen" or cell["peak_memory"] > 0
    frozen = [cell["loss"] for cell in cells if cell["arm"] == "frozen"]
    assert frozen[0] != frozen[1]  # each seed draws examples of its own
    assert "hybrid, shared (default), against full fine-tuning" in table
    assert picture.read_bytes().startswith(b"\x89PNG")

    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n")  # as if it had been killed
    assert main(wanted) == 0
    again = capsys.readouterr().out
    repeated = [record for record in records(path) if record["kind"] == "quality"]
    assert [(c["arm"], c["seed"], c["wrong"]) for c in repeated] == [
        (c["arm"], c["seed"], c["wrong"]) for c in cells
    ]
    assert main(wanted) == 0 and len(records(path)) == len(lines) + 1  # a second run's head
    assert capsys.readouterr().out == again
    assert main([*wanted, "--epochs", "2", "--arms", "frozen"]) == 0  # another setting: anew
    assert len(records(path)) == len(lines) + 1 + 1 + 4 + 2


def test_the_choice_is_the_best_on_held_out_examples(folder, tmp_path):
    path = tmp_path / "quality.jsonl"
    wanted = arguments(folder, "--seeds", "1", "--arms", "frozen", "full", "--json", str(path))
    assert main(wanted) == 0
    for arm, family in (("frozen", "head"), ("full", "full")):
        trials = [r for r in records(path) if r.get("family") == family]
        assert [trial["choice"] for trial in trials] == list(FAMILIES[family].trials)
        best = max(trials, key=lambda t: (t["accuracy"], -t["loss"]))
        (cell,) = (r for r in records(path) if r.get("arm") == arm)
        assert cell["choice"] == best["choice"]


def test_a_cell_of_a_setting_that_is_no_longer_the_best_is_measured_anew(folder, tmp_path):
    path = tmp_path / "quality.jsonl"
    wanted = arguments(folder, "--seeds", "1", "--arms", "frozen", "full", "--resume", str(path))
    assert main(wanted) == 0
    before = records(path)
    (old,) = (r for r in before if r.get("arm") == "full")
    other = next(r for r in before if r.get("family") == "full" and r["choice"] != old["choice"])
    other["accuracy"] = 2.0
    path.write_text("".join(json.dumps(record) + "\n" for record in before))
    assert main(wanted) == 0
    (head, new) = records(path)[len(before) :]
    assert head["kind"] == "run" and (new["arm"], new["choice"]) == ("full", other["choice"])


def test_other_weights_or_texts_of_the_same_names_are_other_results(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    path = tmp_path / "quality.jsonl"

    def measured() -> int:
        """Cells that a run of one arm and seed adds."""
        before = len(records(path)) if path.exists() else 0
        wanted = arguments(copied, "--seeds", "1", "--arms", "frozen", "--resume", str(path))
        assert main(wanted) == 0
        return sum(record["kind"] == "quality" for record in records(path)[before:])

    assert [measured(), measured()] == [1, 0]
    encoder = transformers.BertModel.from_pretrained(copied / "model")
    encoder.embeddings.word_embeddings.weight.data[5] += 1.0
    encoder.save_pretrained(copied / "model")
    assert [measured(), measured()] == [1, 0]
    train = copied / "toy.train.jsonl"
    train.write_text(train.read_text().replace('"label": 1', '"label": 0', 1))
    assert [measured(), measured()] == [1, 0]


# --- the parts


def test_every_arm_trains_what_it_says(folder):
    pretrained, task = toy(folder)
    start = probe.fit(torch.randn(48, 32), task.train.labels[:48], 2, 0.1)
    train, recipe = task.train.take(torch.arange(48)), Recipe(8, 1)
    found = {
        name: train_and_test(pretrained, task, arm, start, 1e-3, 0, recipe, train, task.test)
        for name, arm in ARMS.items()
    }
    head = 32 * 2 + 2
    adapter = {name: outcome.trained_parameters - head for name, outcome in found.items()}
    hidden, inner, layers = 32, 48, 2
    lora = layers * 4 * 8 * 2 * hidden
    bottleneck = layers * sum(2 * 64 * width + 64 + width for width in (hidden, inner))
    assert adapter["frozen"] == 0
    assert adapter["lora"] == lora
    assert adapter["bottleneck"] == bottleneck
    assert adapter["hybrid-unshared"] == lora + bottleneck
    model = pretrained.classifier(2, frozen=True)
    assert adapter["hybrid"] == parameters_of(model, hybrid_config(model)) < lora + bottleneck
    a_rank = layers * (4 * 2 * hidden + 2 * (hidden + inner))
    assert abs(adapter["lora-budget"] - adapter["hybrid"]) <= a_rank / 2
    pooler = hidden * hidden + hidden
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert adapter["full"] == encoder - pooler
    scored, turned = found["dynamic"].sizes, found["reversed"].sizes
    assert len(set(scored.values())) > 2 and len(set(turned.values())) > 2
    relative = [[size / (8 if "attention" in path else 64) for path, size in sizes.items()]
                for sizes in (scored, turned)]  # fmt: skip
    assert numpy.corrcoef(relative)[0, 1] < 0 < len({*scored.items()} ^ {*turned.items()})
    assert found["random"].sizes not in (scored, turned)


def test_controls_give_the_same_scores_to_other_modules():
    scores = {"a": 0.6, "b": 0.1, "c": 0.2, "d": 0.1}
    assert arms._reversed(None, scores, 0) == {"a": 0.1, "b": 0.6, "c": 0.1, "d": 0.2}
    shuffled = [arms._shuffled(None, scores, seed) for seed in range(5)]
    assert all(sorted(found.values()) == sorted(scores.values()) for found in shuffled)
    assert any(found != scores for found in shuffled) and shuffled[0] != shuffled[1]


def test_arms_start_from_the_frozen_arms_head(folder):
    """With a rate of nothing, no arm moves from where the frozen one ends."""
    pretrained, task = toy(folder)
    model = pretrained.classifier(2, frozen=True)
    features = outputs(pretrained, model, task.train, task.pad, "features")
    head = probe.fit(features, task.train.labels, 2, 1e-2)
    nothing = Recipe(8, 0)
    frozen, hybrid, full = (
        train_and_test(
            pretrained, task, ARMS[name], head, 1e-3, 0, nothing, task.train, task.test
        ).logits
        for name in ("frozen", "hybrid", "full")
    )
    assert torch.equal(frozen, hybrid) and torch.equal(frozen, full)
    assert torch.allclose(frozen, head(outputs(pretrained, model, task.test, 0, "features")))


def test_the_probe_is_at_the_minimum_of_its_loss():
    torch.manual_seed(0)
    x, labels = torch.randn(200, 5) * torch.tensor([1.0, 5, 0.1, 2, 1]) + 3, torch.arange(200) % 3
    head, penalty = probe.fit(x, labels, 3, 0.1), 0.1
    deviation = x.std(0)
    weight = (head.weight * deviation).detach().requires_grad_()
    bias = (head.bias + head.weight @ x.mean(0)).detach().requires_grad_()
    logits = torch.nn.functional.linear((x - x.mean(0)) / deviation, weight, bias)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    (loss + penalty / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_outputs_do_not_depend_on_padding_or_order(folder):
    pretrained, task = toy(folder)
    model = pretrained.classifier(2, frozen=True).eval()
    found = outputs(pretrained, model, task.test, task.pad)
    for place in (0, 7, 39):
        alone = task.test.batch([place], task.pad)
        with torch.no_grad():
            logits = model(alone["input_ids"], alone["attention_mask"])["logits"]
        assert torch.allclose(found[place], logits[0], atol=1e-5)


def test_batches_hold_every_example_once_in_an_order_of_the_seed():
    examples = Examples([[i] * (1 + i % 7) for i in range(50)], torch.arange(50), torch.arange(50))
    first, same, other = (random_batches(examples, 8, seed, pad=0) for seed in (1, 1, 2))
    assert sorted(torch.cat([batch["labels"] for batch in first]).tolist()) == list(range(50))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, same, strict=True))
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))
    for batch in first:
        assert torch.equal(batch["attention_mask"].sum(1), 1 + batch["labels"] % 7)


# --- refusals


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds: got 0, allowed: an integer from 1"),
        (["--arms", "lora-rank"], "--arms: got 'lora-rank', allowed: frozen, full"),
        (["--data", "toy.txt"], "got toy.txt, allowed: files called NAME.train.jsonl and"),
        (["--data", "toy.train.jsonl"], "toy.test.jsonl is missing beside the other"),
        (["--model", "nowhere"], "--model: got nowhere, allowed: the folder of an encoder"),
    ],
)
def test_bad_options_are_one_line(folder, capsys, more, message):
    assert main(arguments(folder, *more)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("", '{"text": "a", "label": 0}', "bad.train.jsonl: got an empty file"),
        ('{"text": "a"}', "", 'bad.train.jsonl:1: got \'{"text": "a"}\', allowed: {"text"'),
        ('{"text": "a", "label": 0}', '{"text": "a", "label": 0}', "got 1 labels, allowed: two"),
        (
            '{"text": "a", "label": 0}\n{"text": "a", "label": 1}', '{"text": "a", "label": 2}',
            "bad.test.jsonl: label 2, which",
        ),
    ],
)  # fmt: skip
def test_bad_data_is_one_line(folder, tmp_path, capsys, train, test, message):
    files = [tmp_path / "bad.train.jsonl", tmp_path / "bad.test.jsonl"]
    for file, text in zip(files, (train, test), strict=True):
        file.write_text(text)
    assert main(arguments(folder, "--data", *map(str, files))) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err
