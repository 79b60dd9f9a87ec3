"""A base in few bits: the user's call, the bytes, the gradients, and all that must go on working.

The truth is the same model over the dequantized weights, unpacked here and in fp64.
"""

import copy
import io
import json
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import artemis
from artemis import AdapterError, load_hybrid_adapter, quantize_adapter_model
from artemis.layers.adapted import AdaptedLinear
from artemis.layers.packed import is_packed, sample
from artemis.layers.packed_linear import QUANTIZED, QuantizedLinear, pack, packed_layers
from artemis.quantization import quantize as quantize_module
from artemis_kernels import QuantizedWeight
from tests.artemis.models import (
    adapted,
    assert_same_state,
    bert,
    enable_checkpointing,
    fill_bank,
    gpt2,
    gradients,
    llama,
    snapshot,
    t5,
    tokens,
)
from tests.artemis.quantization.kit import FORMATS, quantized, relative

GPT2 = dict(
    target_modules=["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    apply_lora_to=["attn.c_attn", "attn.c_proj"],
)
BERT = dict(
    target_modules=["query", "key", "value", "intermediate.dense"],
    apply_lora_to=["query", "key", "value"],
)
T5 = dict(target_modules=["q", "k", "v", "o", "wi", "wo"], apply_lora_to=["q", "k", "v", "o"])
MODELS = {"llama": (llama, {}), "gpt2": (gpt2, GPT2), "bert": (bert, BERT), "t5": (t5, T5)}


@torch.no_grad()
def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the weights that `model`'s packed numbers stand for, in fp64."""
    plain.double()
    for path, module in packed_layers(model):
        layer = plain.get_submodule(path)
        weight = module.weight.dequantize(torch.float64)
        layer.weight.copy_(weight if isinstance(layer, nn.Linear) else weight.t())
    return plain


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = tokens()
    labels = torch.tensor([0, 2]) if "Bert" in type(model).__name__ else ids
    return {"input_ids": ids, "labels": labels}


def test_the_users_own_call():
    from artemis.utils.quantization import quantize_adapter_model

    model = adapted(llama())
    # Quantize the model with adapters
    quantized_model = quantize_adapter_model(
        model,
        bits=8,
        adapter_bits=16,  # Can keep adapters in higher precision
    )
    assert quantized_model is model
    assert {p.dtype for p in model.hybrid_adapter.parameters()} == {torch.bfloat16}
    layers = dict(packed_layers(model))
    assert len(layers) == 14 and all(isinstance(m, AdaptedLinear) for m in layers.values())
    assert {m.weight.data.dtype for m in layers.values()} == {torch.int8}
    assert not is_packed(model.lm_head) and type(model.model.embed_tokens) is nn.Embedding
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.51), ("fp8", 0.51), ("int4", 0.29)])
def test_bytes_of_the_weights(format, limit):
    model = llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1).bfloat16()
    linear = [m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    before = sum(m.weight.nbytes for m in linear)
    state_before = sum(t.nbytes for t in model.state_dict().values())
    report = quantized(model, format).quantization_report
    after = sum(t.nbytes for m in linear for n, t in m.named_buffers() if n != "weight_sample")
    assert (report.bytes_before, report.bytes_after) == (before, after)
    assert after <= limit * before and report.of_16_bits <= limit
    state_after = sum(t.nbytes for t in model.state_dict().values())
    assert state_before - state_after > (before - after) - 64 * len(linear)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_that_over_the_dequantized_base(name, format):
    build, settings = MODELS[name]
    plain = build()
    model = adapted(copy.deepcopy(plain), **settings)
    bank = snapshot(model.hybrid_adapter)
    quantized(model, format)
    truth = adapted(dequantized(model, plain), **settings).double()
    truth.hybrid_adapter.load_state_dict(bank)
    batch = inputs(model)
    losses = []
    for each in (model, truth):
        losses.append(each(**batch).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    got, expected = gradients(model), gradients(truth)
    assert got.keys() == expected.keys() and len(got) > 8
    wrong = {n: relative(got[n], expected[n]) for n in got if expected[n].norm() > 1e-12}
    assert max(wrong.values()) < 1e-3, wrong


def test_with_activations_in_eight_bits_the_step_is_still_whole():
    """Rounded x and dY cost a few percent; a lost dX or adapter term would cost all."""
    exact = adapted(llama(hidden_size=64, intermediate_size=96))
    coarse = copy.deepcopy(exact)
    batch = dict(input_ids=(ids := tokens(4, 16)), labels=ids)
    for model, bits in ((exact, 16), (coarse, 8)):
        quantized(model, activation_bits=bits)(**batch).loss.backward()
    expected = gradients(exact)
    got = gradients(coarse)
    assert got.keys() == expected.keys()
    # A gain's gradient is one number, a sum that may cancel.
    wrong = {n: relative(g, expected[n]) for n, g in got.items() if g.ndim}
    assert 1e-4 < max(wrong.values()) < 0.15, wrong


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_before_or_after_is_the_same(name):
    build, settings = MODELS[name]
    first = build()
    second = copy.deepcopy(first)
    quantized(adapted(first, **settings), "int4")
    adapted(quantized(second, "int4"), **settings)
    second.hybrid_adapter.load_state_dict(first.hybrid_adapter.state_dict())
    batch = inputs(first)
    assert torch.equal(first(**batch).logits, second(**batch).logits)
    assert {type(m) for m in first.modules()} == {type(m) for m in second.modules()}


def test_switching_off_and_taking_out_leave_the_quantized_base():
    base = quantized(llama(), "int4")
    model, ids = copy.deepcopy(base), tokens()
    state, expected = snapshot(model), base(ids).logits
    adapted(model)
    assert not torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)
    merged = model.merge_adapter()
    assert not merged.merged and len(merged.active) == 14
    assert "quantized (int4)" in merged.active["model.layers.0.self_attn.q_proj"]
    assert not torch.equal(model(ids).logits, expected)
    model.remove_adapter()
    assert torch.equal(model(ids).logits, expected)
    assert_same_state(model, state)
    assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear


def test_generate_follows_the_dequantized_model():
    plain = llama()
    model = adapted(copy.deepcopy(plain))
    bank = snapshot(model.hybrid_adapter)
    quantized(model)
    truth = adapted(dequantized(model, plain)).double()
    truth.hybrid_adapter.load_state_dict(bank)
    ids = tokens()
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True)
    options["return_dict_in_generate"] = True
    got, expected = model.generate(ids, **options), truth.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert relative(torch.stack(got.logits), torch.stack(expected.logits)) < 1e-4


def test_copies_pickles_and_casts_keep_the_packed_numbers():
    model, ids = quantized(adapted(llama()), "fp8"), tokens()
    expected, state = model(ids).logits, snapshot(model)
    buffer = io.BytesIO(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.load(buffer)):
        assert torch.equal(other(ids).logits, expected)
        fill_bank(other)
        assert not torch.equal(other(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    empty = copy.deepcopy(model)
    for tensor in empty.state_dict().values():
        tensor.zero_()
    empty.load_state_dict(state)
    assert torch.equal(empty(ids).logits, expected)
    layer = model.half().to(torch.bfloat16).model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16
    model.float()
    for path, module in packed_layers(model):
        for part in ("weight_data", "weight_scale"):
            now, before = getattr(module, part), state[f"{path}.{part}"]
            assert now.dtype == before.dtype
            assert torch.equal(now.view(torch.uint8), before.view(torch.uint8))


def test_checkpointing_changes_no_gradient():
    model = quantized(adapted(llama(), adapter_dropout=0.3, lora_dropout=0.2)).train()
    batch = inputs(model)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=False)
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], g) for name, g in results[0].items())


def test_an_adapter_knows_its_base_in_any_bits(tmp_path):
    """Saved on one form of the base and loaded on another, with `strict`: nothing is foreign."""
    base = llama()
    forms = (copy.deepcopy(base), quantized(copy.deepcopy(base)), quantized(base, "int4"))
    for number, form in enumerate(forms):
        source = adapted(copy.deepcopy(form))
        source.save_adapter_parameters(tmp_path / str(number))
        for other in forms:
            model = load_hybrid_adapter(copy.deepcopy(other), tmp_path / str(number), strict=True)
            assert_same_state(model.hybrid_adapter, snapshot(source.hybrid_adapter))
    with pytest.warns(UserWarning, match="not those that the adapter was trained on"):
        load_hybrid_adapter(quantized(llama()), tmp_path / "0")


def test_sixteen_bit_adapters_save_and_load_into_thirty_two(tmp_path):
    base = llama()
    model = quantize_adapter_model(adapted(copy.deepcopy(base)))
    model.save_adapter_parameters(tmp_path)
    loaded = load_hybrid_adapter(base, tmp_path).hybrid_adapter
    for name, tensor in model.hybrid_adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_adapter_bits(bits, dtype):
    model, ids = adapted(llama(), adapter_bias=True).to(dtype), tokens()
    model.hybrid_adapter.float()
    exact = quantized(copy.deepcopy(model), adapter_bits=32)
    before = sum(t.nbytes for t in model.hybrid_adapter.state_dict().values())
    quantized(model, adapter_bits=bits)
    bank = model.hybrid_adapter
    after = sum(t.nbytes for t in bank.state_dict().values())
    narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert bank.bias_up[next(iter(bank.bias_up))].dtype == (torch.float32 if bits == 32 else narrow)
    assert after < {32: 1.01, 16: 0.51, 8: 0.45}[bits] * before
    error = relative(model(ids).logits, exact(ids).logits)
    assert error == 0 if bits == 32 else error < 0.03
    assert error > 0 or bits > 8


def test_eight_bit_adapters_are_for_use_only(tmp_path):
    model = adapted(llama())
    expected = artemis.orthogonality_penalty(model).item()
    model.save_adapter_parameters(tmp_path)
    quantized(model, adapter_bits=8)
    assert not any(p.requires_grad for p in model.parameters())
    assert artemis.orthogonality_penalty(model).item() == pytest.approx(expected, rel=0.1)
    sizes = dict.fromkeys(model.hybrid_adapter.sites, 1.0)
    for refused in (
        lambda: model.save_adapter_parameters(tmp_path),
        lambda: model.load_adapter_parameters(tmp_path),
        lambda: artemis.set_dynamic_rank_allocation(model, sizes, 1, 2, verbose=False),
    ):
        with pytest.raises(AdapterError, match="held in 8 bits, for use only"):
            refused()
    ids = tokens()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    expected = model(ids).logits
    assert torch.equal(model.bfloat16().float()(ids).logits.argmax(-1), expected.argmax(-1))


def test_importance_and_ranks_over_a_quantized_base():
    model, ids = quantized(adapted(llama())), tokens()
    batches = [dict(input_ids=ids, labels=ids), dict(input_ids=ids.flip(0, 1), labels=ids)]
    scores = artemis.analyze_layer_importance(model, batches, batches=2)
    plain = artemis.analyze_layer_importance(
        quantized(llama()), batches, batches=2, config=artemis.HybridAdapterConfig()
    )
    assert scores.keys() == plain.keys() and sum(scores.values()) == pytest.approx(1)
    before = model(ids).logits
    artemis.set_dynamic_rank_allocation(model, scores, min_rank=4, max_rank=8, verbose=False)
    assert relative(model(ids).logits, before) < 0.5
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_parameters_are_counted_packed_or_not(capsys):
    model = adapted(llama())
    model.print_trainable_parameters()
    before = capsys.readouterr().out
    quantized(model).print_trainable_parameters()
    assert capsys.readouterr().out == before


def test_the_old_weights_go_one_by_one(monkeypatch):
    """While layer i is packed, i weights are gone: the whole never stands there twice."""
    model = llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules()
               if type(m) is nn.Linear and n != "lm_head"]  # fmt: skip
    alive = []
    pack = quantize_module.pack

    def counting(*args):
        alive.append(sum(weight() is not None for weight in weights))
        pack(*args)

    monkeypatch.setattr(quantize_module, "pack", counting)
    quantized(model)
    assert alive == list(range(14, 0, -1))
    assert not any(weight() for weight in weights)


def test_the_report_tells_the_truth():
    model = llama()
    before = copy.deepcopy(model)
    report = quantized(model, "int4", group_size=16).quantization_report
    assert [layer.path for layer in report.layers] == [p for p, _ in packed_layers(model)]
    for layer in report.layers:
        weight = before.get_submodule(layer.path).weight.double()
        packed = model.get_submodule(layer.path).weight.dequantize(torch.float64)
        assert layer.relative_error == pytest.approx(relative(packed, weight), rel=1e-4)
        noise = 10 * torch.log10(weight.square().sum() / (packed - weight).square().sum()).item()
        assert layer.snr_db == pytest.approx(noise, abs=0.01)
        assert (layer.format, layer.group_size) == ("int4", 16)
    assert report.skipped == {"lm_head": "the output head; include_head=True takes it too"}
    values = json.loads(json.dumps(report.to_dict()))
    assert artemis.QuantizationReport.from_dict(values) == report
    assert values["layers"][0]["snr_db"] == report.layers[0].snr_db
    assert report.layers[3].path in str(report) and "as it was: the output head" in str(report)


def test_data_weighs_the_columns():
    """Where a few inputs of a layer are large, its output errs less after looking at some."""
    model = llama(hidden_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[::16] *= 30
    ids = tokens(8, 16)
    target = model.model.layers[0].self_attn.q_proj
    seen = []
    handle = target.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    model(ids)
    handle.remove()
    x, y = seen[0]
    errors = []
    for data in (None, [{"input_ids": ids}]):
        packed = quantized(copy.deepcopy(model).train(), "int4", data=data)
        assert packed.training
        layer = packed.model.layers[0].self_attn.q_proj
        assert not layer._forward_pre_hooks
        errors.append(relative(layer(x), y))
    assert errors[1] < 0.8 * errors[0]


def test_the_output_head_on_request():
    model = quantize_adapter_model(llama(), include_head=True, progress=False)
    assert type(model.lm_head) is QuantizedLinear
    assert not model.quantization_report.skipped
    logits = {path for path, module in packed_layers(model) if module.weight.makes_logits}
    assert logits == {"lm_head"}


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_tied_head_becomes_a_matrix_of_its_own(build, tmp_path):
    tied = dict(tie_word_embeddings=True) if build is llama else {}
    model, ids = build(**tied), tokens()
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    before, expected = embedding.detach().clone(), model(ids).logits
    quantize_adapter_model(model, include_head=True, progress=False, activation_bits=16)
    assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, before)
    head = model.get_output_embeddings()
    assert head.weight.format == "int8" and head.weight.makes_logits
    report = model.quantization_report
    replaced = report.bytes_before - before.nbytes  # the embedding stays
    saved = report.model_bytes_before - report.model_bytes_after
    assert abs(replaced - report.bytes_after - saved) <= 64 * len(report.layers)  # of samples
    got = model(ids).logits
    assert relative(got, expected) < 0.05
    artemis.save_quantized(model, tmp_path)
    for target in (build(**tied), model.config):
        loaded = artemis.load_quantized(target, tmp_path)
        assert torch.equal(loaded(ids).logits, got)
        assert loaded.get_output_embeddings().weight.makes_logits


def test_gradients_through_a_head_in_eight_bits():
    """Against the same adapter over the dequantized head, whose words have much in common."""
    model = adapted(llama(vocab_size=3000, hidden_size=64))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(64) / 20)
    ids = torch.randint(3000, (4, 64))
    quantize_adapter_model(
        model, include_head=True, activation_bits=8, adapter_bits=32, progress=False
    )
    head = model.lm_head
    dense = head.weight.dequantize()
    found = []
    for forward in (head.forward, lambda x: x @ dense.t()):
        head.forward = forward
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(gradients(model))
    got, wanted = found
    for name in wanted:
        assert relative(got[name], wanted[name]) < 0.2, name


def test_heads_that_train_and_tied_weights_stay():
    classifier = quantized(adapted(bert(), **BERT), include_head=True)
    assert classifier.quantization_report.skipped == {"classifier": "a head that trains"}
    assert classifier.classifier.weight.requires_grad
    tied = llama()
    layers = tied.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    skipped = quantized(tied).quantization_report.skipped
    assert skipped["model.layers.1.mlp.up_proj"] == (
        "its weight is also model.layers.0.mlp.up_proj.weight"
    )
    assert "model.layers.0.mlp.up_proj" in skipped


def test_no_warning_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_adapter_model(adapted(llama()))(tokens())


class Bare:
    """A packed layer without an adapter, and what it must compute."""

    def __init__(self, kind: type[nn.Module], format: str, dtype: torch.dtype):
        self.layer = self.packed(kind, format).to(dtype)
        self.x = torch.randn(3, 128).to(dtype)

    @staticmethod
    def packed(kind: type[nn.Module], format: str) -> nn.Module:
        layer = kind(40, 128) if kind is Conv1D else kind(128, 40)
        weight = layer.weight.detach()
        weight = (weight.t() if kind is Conv1D else weight) + 0.1 * torch.randn(40, 128)
        nn.init.normal_(layer.bias)
        held = QuantizedWeight.quantize(weight, format, activation_bits=16)
        pack(layer, QUANTIZED[kind], held, sample(weight))
        return layer

    @torch.no_grad()
    def assert_right(self, dtype: torch.dtype | None = None) -> None:
        """Twice: constants are made, then taken."""
        x = self.x.to(dtype or self.x.dtype)
        bias = 0 if self.layer.bias is None else self.layer.bias.double()
        truth = x.double() @ self.layer.weight.dequantize(torch.float64).t() + bias
        for _ in range(2):
            assert relative(self.layer(x), truth) < (1e-5 if x.dtype == torch.float32 else 0.01)
            assert self.layer.ready is not None


@pytest.fixture(params=[nn.Linear, Conv1D], ids=["linear", "conv1d"])
def bare(request) -> Bare:
    """In bf16, where few rows take the pass that holds addresses."""
    return Bare(request.param, "int8", torch.bfloat16)


def other_bias(layer: nn.Module) -> torch.Tensor:
    return layer.bias.detach() + 1


BARE_CHANGES = {
    "data": lambda layer, other: layer.weight_data.neg_(),
    "scale": lambda layer, other: layer.weight_scale.mul_(3),
    "scale.data": lambda layer, other: setattr(
        layer.weight_scale, "data", layer.weight_scale.data * 3
    ),
    "bias": lambda layer, other: layer.bias.add_(1),
    "bias.data": lambda layer, other: setattr(layer.bias, "data", other_bias(layer)),
    "another bias": lambda layer, other: setattr(layer, "bias", nn.Parameter(other_bias(layer))),
    "no bias": lambda layer, other: setattr(layer, "bias", None),
    "another buffer": lambda layer, other: setattr(layer, "weight_data", -layer.weight_data),
    "loaded": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "assigned": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
}


@pytest.mark.parametrize("change", BARE_CHANGES)
@torch.no_grad()
def test_a_bare_layer_sees_every_change(change, bare):
    bare.assert_right()
    before = bare.layer(bare.x)
    other = bare.packed(nn.Linear, "int8").to(torch.bfloat16)
    BARE_CHANGES[change](bare.layer, other)
    bare.assert_right()
    assert relative(bare.layer(bare.x), before) > 0.1


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_bare_layer_that_is_moved(format):
    bare = Bare(nn.Linear, format, torch.float32)
    bare.assert_right()
    for dtype in (torch.bfloat16, torch.float32):
        bare.layer.to(dtype)
        assert bare.layer.ready is None
        bare.assert_right(dtype)
    bare.layer.bias.add_(1)
    bare.layer.share_memory()
    bare.assert_right()


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@torch.no_grad()
def test_copies_of_a_bare_layer_start_without_constants(how, bare):
    bare.assert_right()
    wanted, names = bare.layer(bare.x), set(bare.layer.state_dict())
    assert names == {"weight_data", "weight_scale", "weight_sample", "bias"}
    other = how(bare.layer)
    assert other.ready is None and bare.layer.ready is not None
    assert torch.equal(other(bare.x), wanted)
    other.bias.add_(1)
    assert not torch.equal(other(bare.x), wanted) and torch.equal(bare.layer(bare.x), wanted)


def test_a_bare_layer_with_gradients_makes_no_constants(bare):
    x = bare.x.clone().requires_grad_()
    bare.layer(x).float().sum().backward()
    assert bare.layer.ready is None
    wanted = bare.layer.weight.dequantize(torch.float64).sum(0)
    assert relative(x.grad, wanted.expand_as(x)) < 0.01


@torch.no_grad()
def test_a_bare_layer_that_is_traced_or_mapped(bare):
    """Where sizes are tensors, or rows have no address, it is an operator, then and later."""
    wanted = bare.layer(bare.x)
    bare.layer.ready = None
    traced = torch.jit.trace(bare.layer, bare.x)
    assert torch.equal(traced(bare.x), wanted)
    mapped = torch.vmap(bare.layer)(bare.x[:, None])[:, 0]
    assert relative(mapped, wanted) < 0.02
    bare.assert_right()


@torch.no_grad()
def test_a_replica_of_a_bare_layer_has_a_weight_of_its_own(bare):
    """`nn.DataParallel` copies a module's attributes and replaces its tensors."""
    wanted = bare.layer(bare.x)
    replica = bare.layer._replicate_for_data_parallel()
    for name, tensor in bare.layer._buffers.items():
        replica._buffers[name] = None if tensor is None else tensor.clone()
    replica._parameters["bias"] = nn.Parameter(bare.layer.bias + 1)
    moved = replica(bare.x)
    assert not torch.equal(moved, wanted) and torch.equal(bare.layer(bare.x), wanted)
