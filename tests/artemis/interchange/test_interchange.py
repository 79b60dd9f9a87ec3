"""Export to PEFT's files and import from them, with PEFT itself as the judge."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import artemis
from artemis.allocation.resize import resize
from artemis.interchange.files import SETTINGS_FILE, TENSORS_FILE
from tests.artemis.models import adapted, bert, gpt2, llama, t5, tokens

peft = pytest.importorskip("peft")

LLAMA_LORA = ["q_proj", "k_proj", "v_proj", "o_proj"]
ONLY_LORA = dict(target_modules=LLAMA_LORA, apply_lora_to=LLAMA_LORA)
ALMOST = dict(rtol=1e-5, atol=1e-5)


def logits(model, ids):
    both = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **both).logits


def settings_of(folder):
    return json.loads((folder / SETTINGS_FILE).read_text())


def uneven(model):
    """Ranks 1 to 4, other ones in each layer, and no two alike within q, k and v."""
    paths = list(model.hybrid_adapter.sites)
    resize(model.hybrid_adapter, {path: 1 + n % 4 for n, path in enumerate(paths)}, None)
    return model


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ranks", ["equal", "uneven"])
@pytest.mark.parametrize("form", artemis.interchange.FORMS)
def test_peft_computes_what_was_exported(form, ranks, shared, tmp_path):
    base, ids = llama(), tokens()
    ours = adapted(copy.deepcopy(base), shared_parameters=shared, **ONLY_LORA)
    if ranks == "uneven":
        uneven(ours)
    expected = logits(ours, ids)
    report = artemis.export_adapter(ours, tmp_path, form=form)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    torch.testing.assert_close(logits(theirs, ids), expected, **ALMOST)
    assert report.left_out == () and set(report.modules) == set(ours.hybrid_adapter.sites)
    assert torch.equal(logits(ours, ids), expected)  # the model is as it was


def test_transposed_layers_are_exported(tmp_path):
    base, ids, names = gpt2(), tokens(), ["c_attn", "c_fc"]
    ours = adapted(copy.deepcopy(base), target_modules=names, apply_lora_to=names)
    artemis.export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), **ALMOST)


def test_trained_heads_go_along(tmp_path):
    base, ids, names = bert(), tokens(), ["query", "value"]
    ours = adapted(copy.deepcopy(base), target_modules=names, apply_lora_to=names)
    with torch.no_grad():
        ours.classifier.weight.normal_()
        ours.classifier.bias.normal_()
    report = artemis.export_adapter(ours, tmp_path)
    assert report.heads == ("classifier",) and settings_of(tmp_path)["task_type"] == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), **ALMOST)
    again = artemis.load_peft_adapter(bert_like(base), tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(ours, ids), **ALMOST)


def bert_like(peft_base):
    """A plain model of the same body (PEFT wrapped the head of the one it was given)."""
    model, body = bert(), peft_base.bert.state_dict()
    plain = {name: body[name] for name in model.bert.state_dict() if name in body}
    wrapped = {
        name: body[
            name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        ]
        for name in model.bert.state_dict()
        if name not in plain
    }
    model.bert.load_state_dict(plain | wrapped)
    return model


def test_a_reader_of_one_rank_and_one_factor(tmp_path):
    """As servers read it: alpha / r for every module, no other setting."""
    ours = uneven(adapted(llama(), scaling_factor=0.7, **ONLY_LORA))
    artemis.export_adapter(ours, tmp_path, form="vllm")
    settings, tensors = settings_of(tmp_path), load_file(tmp_path / TENSORS_FILE)
    assert settings["lora_alpha"] == settings["r"] == 4 and not settings["rank_pattern"]
    assert not settings["alpha_pattern"] and settings["modules_to_save"] is None
    bank = ours.hybrid_adapter
    for path, site in bank.sites.items():
        own = bank.tensors(site.layout)
        a, b = (tensors.pop(f"base_model.model.{path}.lora_{m}.weight") for m in "AB")
        assert a.shape[0] == b.shape[1] == 4
        expected = 0.7 * own["gain"].double() * own["lora_b"].double() @ own["lora_a"].double()
        torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-6, atol=1e-7)
    assert not tensors  # one stray tensor makes such a reader refuse the file


@pytest.mark.parametrize("name", ["some/base", ""])
def test_settings_are_the_adapters(name, tmp_path):
    """A whole alpha is written as an integer: some readers take no other."""
    ours = uneven(adapted(llama(), scaling_factor=0.75, lora_dropout=0.1, **ONLY_LORA))
    ours.config._name_or_path = name
    artemis.export_adapter(ours, tmp_path)
    settings = settings_of(tmp_path)
    assert settings["base_model_name_or_path"] == (name or None)
    assert settings["lora_dropout"] == 0.1
    alphas = [settings["lora_alpha"], *settings["alpha_pattern"].values()]
    ranks = [settings["r"], *settings["rank_pattern"].values()]
    written = {1: "0.75", 2: "1.5", 3: "2.25", 4: "3"}
    assert set(ranks) == set(written)
    assert [json.dumps(alpha) for alpha in alphas] == [written[rank] for rank in ranks]


def test_a_saved_adapter_is_exported_as_its_model_is(tmp_path):
    ours = uneven(adapted(llama(), **ONLY_LORA))
    ours.save_adapter_parameters(tmp_path / "saved")
    artemis.export_adapter(tmp_path / "saved", tmp_path / "a")
    artemis.export_adapter(ours, tmp_path / "b")
    for name in (SETTINGS_FILE, TENSORS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_compiled_model_is_saved_and_exported_as_what_it_wraps(tmp_path):
    model = adapted(llama(), **ONLY_LORA)
    compiled = torch.compile(model, backend="eager")
    for name, source in (("plain", model), ("compiled", compiled)):
        source.save_adapter_parameters(tmp_path / name)
        artemis.export_adapter(source, tmp_path / name)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "compiled" / path.name).read_bytes(), path.name


def test_half_a_hybrid_only_where_it_is_asked_for(tmp_path):
    base, ids = llama(), tokens()
    ours = adapted(copy.deepcopy(base))
    with pytest.raises(artemis.AdapterError, match=r"more than LoRA .*mlp.*allow_partial"):
        artemis.export_adapter(ours, tmp_path)
    assert list(tmp_path.iterdir()) == []
    report = artemis.export_adapter(ours, tmp_path, allow_partial=True)
    assert len(report.left_out) == 6 and "another model" in str(report)
    with torch.no_grad():  # without its bottlenecks the hybrid is what was exported
        for tensor in (*ours.hybrid_adapter.up.values(), *ours.hybrid_adapter.bias_up.values()):
            tensor.zero_()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), **ALMOST)


def test_what_cannot_be_exported(tmp_path):
    names = ["gate_proj"]
    only_bottlenecks = adapted(llama(), target_modules=names, apply_lora_to=[])
    with pytest.raises(artemis.AdapterError, match="has no LoRA"):
        artemis.export_adapter(only_bottlenecks, tmp_path, allow_partial=True)
    with pytest.raises(artemis.AdapterError, match="has no hybrid adapter"):
        artemis.export_adapter(llama(), tmp_path)
    with pytest.raises(artemis.AdapterError, match="form: got 'gguf', allowed: peft or vllm"):
        artemis.export_adapter(adapted(llama(), **ONLY_LORA), tmp_path, form="gguf")
    with pytest.raises(FileNotFoundError):
        artemis.export_adapter(tmp_path / "none", tmp_path)
    in_8_bits = adapted(llama(), **ONLY_LORA)
    artemis.quantize_adapter_model(in_8_bits, bits=8, adapter_bits=8)
    with pytest.raises(artemis.AdapterError, match="8 bits"):
        artemis.export_adapter(in_8_bits, tmp_path)
    classifier = adapted(bert(), target_modules=["query"], apply_lora_to=["query"])
    with pytest.raises(artemis.AdapterError, match=r"more than LoRA \(classifier\)"):
        artemis.export_adapter(classifier, tmp_path, form="vllm")
    assert list(tmp_path.iterdir()) == []


def saved_by_peft(base, folder, **settings):
    """Random A and B in PEFT's model over `base`, saved; returns PEFT's model."""
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "build, settings",
    [
        (llama, dict(r=4, lora_alpha=6, target_modules=LLAMA_LORA)),
        (llama, dict(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True)),
        (llama, dict(r=4, lora_alpha=6, target_modules=["q_proj"], layers_to_transform=[1])),
        (
            llama,
            dict(
                r=4, lora_alpha=6, target_modules=LLAMA_LORA, rank_pattern={"q_proj": 3},
                alpha_pattern={r"layers\.1\.self_attn\.[kq]_proj": 5},
            ),
        ),
        # A pattern is a whole name, or the end of a path: `o` is not `wo`.
        (t5, dict(r=4, lora_alpha=6, target_modules=["o", "wo"], alpha_pattern={"o": 5})),
        (gpt2, dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
        (
            bert,
            dict(r=4, lora_alpha=6, target_modules=["query"], task_type="SEQ_CLS"),
        ),
    ],
    ids=["plain", "rslora", "one-layer", "patterns", "names", "gpt2", "classifier"],
)  # fmt: skip
def test_what_peft_saved_computes_the_same(build, settings, tmp_path):
    base, ids = build(), tokens()
    ours = copy.deepcopy(base)
    expected = logits(saved_by_peft(base, tmp_path, **settings), ids)
    artemis.load_peft_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, ids), expected, **ALMOST)
    # It is an adapter of ours from here on.
    ours.save_adapter_parameters(tmp_path / "own")
    again = artemis.load_hybrid_adapter(bare(ours), tmp_path / "own")
    torch.testing.assert_close(logits(again, ids), expected, **ALMOST)


def test_what_settings_leave_out_is_what_peft_takes(tmp_path):
    """Of older files: no alpha, no pattern, no dropout."""
    base, ids = llama(), tokens()
    ours = copy.deepcopy(base)
    saved_by_peft(copy.deepcopy(base), tmp_path, r=4, lora_alpha=6, target_modules=LLAMA_LORA)
    few = {name: settings_of(tmp_path)[name] for name in ("peft_type", "r", "target_modules")}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(few))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    artemis.load_peft_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **ALMOST)


def bare(model):
    other = copy.deepcopy(model)
    other.remove_adapter()
    return other


def test_sharing_survives_the_way_there_and_back(tmp_path):
    base, ids = llama(), tokens()
    ours = uneven(adapted(copy.deepcopy(base), **ONLY_LORA))
    artemis.export_adapter(ours, tmp_path)
    again = artemis.load_peft_adapter(copy.deepcopy(base), tmp_path, shared_parameters=True)
    torch.testing.assert_close(logits(again, ids), logits(ours, ids), **ALMOST)
    assert again.hybrid_adapter.lora_a.keys() == ours.hybrid_adapter.lora_a.keys()
    apart = adapted(copy.deepcopy(base), shared_parameters=False, **ONLY_LORA)
    artemis.export_adapter(apart, tmp_path)
    with pytest.raises(artemis.AdapterError, match="shared_parameters: got True, allowed: False"):
        artemis.load_peft_adapter(base, tmp_path, shared_parameters=True)
    assert not hasattr(base, "hybrid_adapter")


def test_an_imported_adapter_trains(tmp_path):
    base, ids = llama(), tokens()
    ours = copy.deepcopy(base)
    saved_by_peft(base, tmp_path, r=4, lora_alpha=6, target_modules=LLAMA_LORA, lora_dropout=0.1)
    artemis.load_peft_adapter(ours, tmp_path)
    assert ours.hybrid_adapter.config.lora_dropout == 0.1
    ours.train()(ids, labels=ids).loss.backward()
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in ours.named_parameters() if n.startswith("hybrid_adapter.")}
    assert all(p.grad.abs().sum() > 0 for p in ours.hybrid_adapter.parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "peft_type: got 'IA3', allowed: 'LORA'"),
        (dict(use_dora=True), "use_dora: got True, allowed: none"),
        (dict(bias="all"), "bias: got 'all', allowed: 'none'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights: got 'pissa', which changed the base"),
        (dict(init_lora_weights="OLoRA"), "init_lora_weights: got 'OLoRA', which changed the base"),
        (dict(r=5), "A of model.layers.0.self_attn.k_proj has 4 rows, .* rank 5"),
    ],
)
def test_settings_that_are_refused(change, message, tmp_path):
    base = llama()
    ours = copy.deepcopy(base)
    saved_by_peft(base, tmp_path, r=4, lora_alpha=6, target_modules=LLAMA_LORA)
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps(settings_of(tmp_path) | change))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(artemis.AdapterError, match=message):
        artemis.load_peft_adapter(ours, tmp_path)
    unchanged = ours.state_dict()
    assert before.keys() == unchanged.keys()
    assert all(torch.equal(before[name], unchanged[name]) for name in before)
    assert type(ours.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    "change, message",
    [
        ({"{q}.lora_B.weight": None}, "only A or only B of model.layers.0.self_attn.q_proj"),
        ({"{q}.lora_A.weight": torch.zeros(4, 31)}, "q_proj is 32x32, in the file 31x32"),
        ({"{q}.lora_B.weight": torch.zeros(31, 4)}, "q_proj is 32x32, in the file 32x31"),
        (
            {"{q}.lora_A.weight": torch.zeros(0, 32), "{q}.lora_B.weight": torch.zeros(32, 0)},
            r"A of .*q_proj is \(0, 32\) and B \(32, 0\)",
        ),
        ({"{q}.lora_A.weight": torch.zeros(3, 32)}, r"A of .*q_proj is \(3, 32\) and B \(32, 4\)"),
        (
            {"base_model.model.model.norm.weight": torch.zeros(32)},
            "holds model.norm.weight, allowed: LoRA",
        ),
        (
            {
                "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(
                    4, 32
                ),
                "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(
                    32, 4
                ),
            },
            "there is no model.layers.7.self_attn.q_proj",
        ),
    ],
    ids=["half", "inputs", "outputs", "no-rank", "rank", "norm", "layer"],
)
def test_tensors_that_are_refused(change, message, tmp_path):
    base = llama()
    ours = copy.deepcopy(base)
    saved_by_peft(base, tmp_path, r=4, lora_alpha=6, target_modules=LLAMA_LORA)
    tensors = load_file(tmp_path / TENSORS_FILE)
    for name, tensor in change.items():
        name = name.format(q="base_model.model.model.layers.0.self_attn.q_proj")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(artemis.AdapterError, match=message):
        artemis.load_peft_adapter(ours, tmp_path)
    assert not hasattr(ours, "hybrid_adapter")


def test_lora_within_a_head_is_refused(tmp_path):
    base = bert()
    ours = copy.deepcopy(base)
    saved_by_peft(base, tmp_path, r=4, target_modules=["query"], task_type="SEQ_CLS")
    tensors = load_file(tmp_path / TENSORS_FILE)
    tensors["base_model.model.classifier.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.classifier.lora_B.weight"] = torch.zeros(3, 4)
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(artemis.AdapterError, match="classifier: LoRA within a module that is sa"):
        artemis.load_peft_adapter(ours, tmp_path)
    assert not hasattr(ours, "hybrid_adapter")


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no PEFT adapter"):
        artemis.load_peft_adapter(llama(), tmp_path)
    base = llama()
    saved_by_peft(base, tmp_path, r=4, target_modules=LLAMA_LORA)
    with pytest.raises(artemis.AdapterError, match="load_peft_adapter loads it"):
        artemis.load_hybrid_adapter(llama(), tmp_path)
    (tmp_path / TENSORS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled"):
        artemis.load_peft_adapter(llama(), tmp_path)
