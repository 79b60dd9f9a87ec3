"""train, generate, info and export: what they print, what they leave, and how they fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import artemis
from artemis import (
    export_adapter,
    load_hybrid_adapter,
    quantize_adapter_model,
    read_adapter,
    save_quantized,
)
from artemis.benchmark.arms import DECODING, TRAINING
from artemis.benchmark.quality.arms import ARMS as QUALITY
from artemis.cli import COMMANDS, main
from artemis.cli.demo.corpus import byte_pairs
from artemis.cli.generate import continue_text
from artemis.layers.packed_linear import packed_layers
from artemis.training import load_base
from tests.artemis.models import adapted

from .files import training_file


@pytest.fixture(scope="module")
def int8_base(workspace, tmp_path_factory) -> Path:
    """The workspace's base model in 8 bits, as `save_quantized` leaves it: no tokenizer."""
    model, _ = load_base(str(workspace.directory / "base"), torch.float32)
    folder = tmp_path_factory.mktemp("int8")
    save_quantized(quantize_adapter_model(model, progress=False), folder)
    return folder


# --- train


def test_train_saves_an_adapter_and_reports(workspace, tmp_path, capsys):
    assert main(["train", str(training_file(workspace, tmp_path)), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    saved = read_adapter(tmp_path / "out")
    assert result["steps"] == 4
    assert result["trainable_parameters"] == saved.parameters
    assert saved.config.lora_rank == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "hybrid_adapter.safetensors",
        "hybrid_adapter_config.json",
    }
    assert result["eval_loss"] > 0


def test_train_says_what_it_did_in_words(workspace, tmp_path, capsys):
    assert main(["train", str(training_file(workspace, tmp_path))]) == 0
    output = capsys.readouterr().out
    own = read_adapter(tmp_path / "out").parameters
    model, _ = load_base(str(workspace.base), torch.float32)
    share = own / (own + sum(p.numel() for p in model.parameters()))
    assert f"trained {own:,} parameters ({100 * share:.2f}% of the model)" in output
    assert f"saved in {tmp_path / 'out'}" in output
    assert "held-out loss" in output


def test_without_an_adapter_the_whole_model_is_trained(workspace, tmp_path):
    path = training_file(workspace, tmp_path)
    values = yaml.safe_load(path.read_text())
    del values["hybrid_adapter"]
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    base, _ = load_base(values["model"], torch.float32)
    trained, tokenizer = load_base(str(tmp_path / "out"), torch.float32)
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    assert tokenizer("a")["input_ids"]


#: `python -m artemis.cli`, killed in its 13th step.
KILLED = """
import os, runpy, signal
from artemis.training import Trainer, run

class Dying(Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

run.Trainer = Dying
runpy.run_module("artemis.cli", run_name="__main__")
"""


def test_a_killed_run_resumes_to_the_same_adapter(workspace, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    schedule = dict(max_steps=20, save_steps=5, precision="fp32", save_total_limit=None)
    assert main(["train", str(training_file(workspace, whole, **schedule))]) == 0

    command = [sys.executable, "-c", KILLED, "train", training_file(workspace, cut, **schedule)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    left = {path.name for path in (cut / "out").iterdir()}
    assert left == {"checkpoint-5", "checkpoint-10"}
    assert main(["train", str(cut / "train.yaml"), "--resume"]) == 0

    name = "hybrid_adapter.safetensors"
    expected, got = load_file(whole / "out" / name), load_file(cut / "out" / name)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


# --- generate


def test_generate_continues_the_prompt(workspace, capsys):
    arguments = ["generate", str(workspace.directory / "base"), "--prompt", "The ", "--json"]
    arguments += ["--max-new-tokens", "7", "--adapter", str(workspace.directory / "hybrid")]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"].startswith("The ")
    assert 1 <= result["new_tokens"] <= 7
    assert main([*arguments[:4], *arguments[5:]]) == 0
    assert capsys.readouterr().out.rstrip("\n") == result["text"]


def test_generate_reads_a_quantized_base(workspace, int8_base, capsys):
    adapter = ["--adapter", str(workspace.directory / "hybrid")]
    arguments = ["--prompt", "The ", "--json", "--max-new-tokens", "5", "--precision", "fp32"]
    assert main(["generate", str(int8_base), *arguments, *adapter]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    model, tokenizer = load_base(str(workspace.directory / "base"), torch.float32)
    quantize_adapter_model(load_hybrid_adapter(model, adapter[1]), adapter_bits=32)
    assert text == continue_text(model.eval(), tokenizer, "The ", 5)[0]


def test_generate_counts_learned_positions_before_it_prints(tmp_path, capsys):
    tokenizer = byte_pairs()
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=8,
        bos_token_id=end, eos_token_id=None,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["generate", str(tmp_path), "--precision", "fp32", "--prompt"]
    assert main([*arguments, "abcde", "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 4
    for prompt, new, words in (
        ("abcde", 5, "--max-new-tokens: got 5 after a prompt of 5, allowed: up to 4"),
        ("abcdefghi", 1, "--prompt: got 9 tokens, allowed: up to 8"),
    ):
        assert main([*arguments, prompt, "--max-new-tokens", str(new)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_a_quantized_base_is_cast_and_keeps_its_own_tokenizer(workspace, int8_base, tmp_path):
    shutil.copytree(int8_base, tmp_path / "base")
    _, tokenizer = load_base(str(int8_base), torch.float32)
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path / "base")
    model, own = load_base(str(tmp_path / "base"), torch.bfloat16, "eager")
    assert own.pad_token == "!" != AutoTokenizer.from_pretrained(model.name_or_path).pad_token
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert len(list(packed_layers(model))) == 14


def test_a_quantized_base_is_trained_under_an_adapter_only(workspace, int8_base, tmp_path, capsys):
    path = training_file(workspace, tmp_path, max_steps=2)
    values = yaml.safe_load(path.read_text()) | {"model": str(int8_base)}
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] > 0
    del values["hybrid_adapter"]
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 1
    assert "is quantized, allowed: with a hybrid_adapter" in capsys.readouterr().err


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_base_trains_by_our_attention(workspace, tmp_path, monkeypatch, fused):
    """In bf16 such short sequences would be the plain attention's, which fusing leaves."""
    loaded = []

    def load(*arguments):
        loaded.append(load_base(*arguments))
        return loaded[-1]

    monkeypatch.setattr("artemis.training.run.load_base", load)
    path = training_file(workspace, tmp_path, max_steps=1, precision="bf16")
    values = yaml.safe_load(path.read_text())
    values["hybrid_adapter"]["fuse_model"] = fused
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    ((model, _),) = loaded
    assert model.config._attn_implementation == ("artemis" if fused else "eager")


def test_generate_uses_the_adapter(workspace, capsys, tmp_path):
    base = str(workspace.directory / "base")
    model, _ = load_base(base, torch.float32)
    load_hybrid_adapter(model, workspace.directory / "hybrid")
    with torch.no_grad():
        for parameter in model.hybrid_adapter.parameters():
            parameter.normal_()
    model.save_adapter_parameters(tmp_path)
    texts = []
    for extra in ([], ["--adapter", str(tmp_path)]):
        assert main(["generate", base, "--prompt", "def ", "--precision", "fp32", *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_an_adapter_of_other_weights_is_one_line_of_warning(workspace, capsys, tmp_path):
    model, tokenizer = load_base(str(workspace.base), torch.float32)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["generate", str(tmp_path), "--prompt", "x", "--max-new-tokens", "1"]
    assert main([*arguments, "--adapter", str(workspace.directory / "hybrid")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("artemis generate: warning: ")
    assert error.count("\n") == 1


def test_sampling_repeats_with_its_seed(workspace, capsys):
    texts = []
    for seed in (1, 1, 2):
        arguments = ["generate", str(workspace.directory / "base"), "--prompt", "The "]
        assert main([*arguments, "--temperature", "1.5", "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


# --- info


def test_info_shows_every_module(workspace, capsys):
    assert main(["info", str(workspace.directory / "hybrid")]) == 0
    output = capsys.readouterr().out
    adapter = read_adapter(workspace.directory / "hybrid")
    lines = [line.split() for line in output.splitlines()]
    assert lines[3] == ["module", "kind", "size", "shared", "own"]
    shown = {line[0]: line[1:] for line in lines[4:-2]}
    assert list(shown) == [site.path for site in adapter.plan.sites]
    for module in adapter.modules():
        kind, _, size, shared, own = shown[module.path]
        assert (kind, int(size)) == (module.kind, module.size)
        assert (shared, own) == (f"{module.shared:,}", f"{module.own:,}")
        assert module.shared != module.own
    assert f"{adapter.parameters:,} parameters stored" in output


def test_info_as_json_adds_up(workspace, capsys):
    assert main(["info", str(workspace.directory / "hybrid"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    tensors = load_file(workspace.directory / "hybrid" / "hybrid_adapter.safetensors")
    assert info["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    own = sum(module["own"] for module in info["modules"])
    shared = {(m["path"].rpartition(".")[2], m["shared"]) for m in info["modules"]}
    assert own + sum(size for _, size in shared) == info["parameters"]


def test_info_names_the_heads(workspace, capsys, tmp_path):
    model, _ = load_base(str(workspace.base), torch.float32)
    adapted(model, modules_to_save=["model.norm", "lm_head"]).save_adapter_parameters(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "trained head" in line]
    assert said == [f"{head}  trained head, saved whole" for head in ("model.norm", "lm_head")]


# --- export


def test_export_of_half_a_hybrid(workspace, capsys, tmp_path):
    hybrid = str(workspace.directory / "hybrid")
    arguments = ["export", hybrid, str(tmp_path / "to"), "--form", "vllm", "--json"]
    assert main(arguments) == 1 and not (tmp_path / "to").exists()
    assert "--allow-partial" in capsys.readouterr().err
    assert main([*arguments, "--allow-partial"]) == 0
    report, plan = json.loads(capsys.readouterr().out), read_adapter(hybrid).plan
    assert list(report["modules"]) == [site.path for site in plan.sites if site.kind == "lora"]
    assert report["left_out"] == [site.path for site in plan.sites if site.kind != "lora"]
    tensors = load_file(tmp_path / "to" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(report["modules"])


def test_generate_with_what_was_exported(workspace, capsys, tmp_path):
    base = str(workspace.directory / "base")
    model, _ = load_base(base, torch.float32)
    names = ["q_proj", "v_proj"]
    adapted(model, target_modules=names, apply_lora_to=names)
    texts = []
    model.save_adapter_parameters(tmp_path / "own")
    export_adapter(model, tmp_path / "peft")
    for adapter in ([], ["--adapter", tmp_path / "own"], ["--adapter", tmp_path / "peft"]):
        arguments = ["generate", base, *map(str, adapter), "--prompt", "The "]
        assert main([*arguments, "--max-new-tokens", "20", "--precision", "fp32"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] == texts[2]


# --- failures


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["train", "absent.yaml"], 1, "artemis train: training file 'absent.yaml' does not exist"),
        (["info", "absent"], 1, "artemis info: no hybrid adapter at absent"),
        (["export", "absent", "to"], 1, "artemis export: no hybrid adapter at absent"),
        (["generate", "./absent", "--prompt", "x"], 1, "cannot load the model './absent'"),
        (["demo", "--text", "absent.txt"], 1, "artemis demo: --text: 'absent.txt' does not exist"),
        (["generate", ".", "--prompt", "x", "--max-new-tokens", "0"], 1, "--max-new-tokens: got 0"),
        (["generate", ".", "--prompt", "x", "--temperature", "-1"], 1, "--temperature: got -1.0"),
        (["generate", ".", "--prompt", "x", "--temperature", "nan"], 1, "--temperature: got nan"),
        (["generate", ".", "--prompt", "x", "--temperature", "inf"], 1, "--temperature: got inf"),
        (["generate", ".", "--prompt", "x", "--temperature", "1e-45"], 1, "0, or a number from 1"),
        (["generate", ".", "--prompt", "x", "--seed", "-1"], 1, "--seed: got -1, allowed: an int"),
        (["generate", ".", "--prompt", "x", "--seed", "4294967296"], 1, "from 0 to 4294967295"),
        (["generate", ".", "--prompt", "\udcff"], 1, r"--prompt: got '\udcff', allowed: UTF-8"),
        (["train", "."], 1, "training file '.' does not exist or is not a file"),
        (["generate", "."], 2, "artemis generate: the following arguments are required: --prompt"),
        (["tune", "--device", "gpu"], 1, "--device: got 'gpu', allowed: cpu, cuda or cuda:N"),
        (["tune", "--rows", "8", "0"], 1, "--rows: got 0, allowed: an integer from 1"),
        (["tune", "--show", "--table", "x"], 1, "--table: --show tells what calls read"),
        (["fly"], 2, "invalid choice: 'fly'"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    if status == 2:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    else:
        assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_bad_key_ends_in_one_line(workspace, tmp_path, capsys):
    path = training_file(workspace, tmp_path, learning_rat=1)
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert "training: unknown key 'learning_rat'; did you mean 'learning_rate'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, kind):
    def faulty(args):
        raise kind("not the user's fault")

    monkeypatch.setattr("artemis.cli.info.run", faulty)
    with pytest.raises(kind, match="not the user's fault"):
        main(["info", "x"])


def test_what_is_interrupted_ends_as_shells_report_it(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("artemis.cli.info.run", interrupted)
    assert main(["info", "x"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "artemis: interrupted\n")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk():
    if not Path("/dev/full").exists():
        pytest.skip("no device here that is always full")
    return open("/dev/full", "w")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "output, status, said",
    [
        (closed_pipe, 128 + signal.SIGPIPE, ""),
        (full_disk, 1, "artemis info: [Errno 28] No space left on device\n"),
    ],
)
def test_output_that_nobody_takes(monkeypatch, capsys, output, status, said, streamed):
    """Whether it is noticed while a command runs or at its end, and not once more after it."""
    monkeypatch.setattr("artemis.cli.info.run", lambda args: print("text", flush=streamed))
    with output() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["info", "x"]) == status
    assert capsys.readouterr().err == said


def test_memory_that_a_cpu_has_not_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("artemis.cli.info.run", lambda args: torch.empty(2**60, dtype=torch.uint8))
    assert main(["info", "x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("artemis info: ") and "allocate memory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [command.NAME for command in COMMANDS])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"example:\n  artemis {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "arms"), [("train", TRAINING), ("decode", DECODING), ("quality", QUALITY)]
)
def test_help_of_a_benchmark_names_its_arms(table, arms, capsys):
    with pytest.raises(SystemExit):
        main(["bench", table, "--help"])
    shown = "".join(capsys.readouterr().out.split())  # lines may end within a name
    assert f"of{','.join(arms)}(default" in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"artemis {artemis.__version__}\n"


def test_info_describes_a_quantized_base(int8_base, capsys):
    assert main(["info", str(int8_base)]) == 0
    output = capsys.readouterr().out
    assert "LlamaForCausalLM" in output
    assert "14 layers:" in output and "lm_head  as it was: the output head" in output
    assert main(["info", str(int8_base / "quantized_base.safetensors"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["hidden_size"] == 32
    assert {layer["format"] for layer in values["report"]["layers"]} == {"int8"}
