"""`attn_implementation="artemis"` computes what "sdpa" does, or hands over to it."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import artemis
import artemis_kernels
from artemis.attention import NAME, attention
from artemis.benchmark.decoding import NEW_TOKENS

VOCABULARY = 61
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY,
)  # fmt: skip


def build(config=None, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES), dtype=dtype).eval()


def both(config=None, dtype=torch.float32):
    """The same model with "sdpa" and with ours."""
    plain = build(config, dtype)
    plain.set_attn_implementation("sdpa")
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(NAME)
    return plain, ours


def tokens(batch, length):
    return torch.randint(VOCABULARY, (batch, length))


@pytest.fixture
def calls(monkeypatch):
    """Who attended, in order."""
    found = []

    def noted(name, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            found.append(name)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(artemis_kernels, "attention", noted(NAME, artemis_kernels.attention))
    sdpa = noted("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa)
    return found


def gradients(model, ids, **inputs):
    model.zero_grad()
    result = model(input_ids=ids, labels=ids, use_cache=False, **inputs)
    result.loss.backward()
    return result.logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("length", [5, 140])
def test_training_is_the_same(length, calls):
    plain, ours = both()
    ids = tokens(2, length)
    wanted, of_plain = gradients(plain, ids)
    calls.clear()
    found, of_ours = gradients(ours, ids)
    assert calls == [NAME] * 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient in of_plain.items():
        error = (of_ours[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error:.2g}"


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=5),  # a mask of a window
    ],
    ids=lambda config: config.model_type,
)
def test_padding_and_windows(config, calls):
    plain, ours = both(config)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5], mask[2, 9:] = 0, 0
    wanted = plain(input_ids=ids, attention_mask=mask).logits
    calls.clear()
    found = ours(input_ids=ids, attention_mask=mask).logits
    assert calls == [NAME] * 2
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_the_same(cache):
    plain, ours = both()
    ids = tokens(1, 9)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    options |= {} if cache is None else {"cache_implementation": cache}
    wanted, found = (
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        for model in (plain, ours)
    )
    assert torch.equal(found, wanted)


def attend(query, key, **options):
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    options = {"attention_mask": None, "scaling": 0.5} | options
    return attention(module, query, key, key, **options)[0]


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dtype", "options", "who"),
    [
        (5, 5, 2, torch.bfloat16, {}, NAME),
        (1, 70, 2, torch.bfloat16, {}, NAME),
        (5, 5, 2, torch.float32, {"dropout": 0.5}, "sdpa"),
        (5, 5, 2, torch.float32, {"attention_mask": torch.zeros(1, 1, 5, 5)}, "sdpa"),
        (5, 5, 2, torch.float32, {"position_bias": torch.zeros(1, 4, 5, 5)}, "sdpa"),
        (5, 5, 2, torch.float32, {"is_causal": False}, NAME),
    ],
)
def test_who_attends(queries, keys, heads, dtype, options, who, calls):
    query, key = torch.randn(1, 4, queries, 8).to(dtype), torch.randn(1, heads, keys, 8).to(dtype)
    y = attend(query, key, **options)
    assert calls == [who] and y.shape == (1, queries, 4, 8) and y.is_contiguous()


def test_not_causal_where_the_caller_says_so():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=0.5)
    found = attend(query, key, is_causal=False)
    torch.testing.assert_close(found, whole.transpose(1, 2))


def test_autocast_casts_as_it_does_torchs_products():
    plain, ours = both()
    ids = tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = (model(input_ids=ids).logits for model in (plain, ours))
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_compiled_it_is_torchs(calls):
    _, ours = both()
    ids = tokens(1, 8)
    wanted = ours(input_ids=ids).logits
    calls.clear()
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert NAME not in calls


def test_fusing_takes_it_and_gives_it_back(tmp_path):
    model = build()
    model.set_attn_implementation("sdpa")
    assert artemis.fuse_model(model).attention
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    artemis.unfuse_model(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_fusing_leaves_another_choice(chosen):
    model = build()
    model.set_attn_implementation(chosen)
    assert not artemis.fuse_model(model).attention
    artemis.unfuse_model(model)
    assert model.config._attn_implementation == chosen


def test_a_soft_cap_is_not_dropped():
    """Gemma 2's attention has one, which only transformers' plain attention computes."""
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.1)
    model = build(config)
    wanted = model(input_ids=tokens(1, 6) * 0 + 5).logits
    artemis.fuse_model(model)
    torch.testing.assert_close(
        model(input_ids=tokens(1, 6) * 0 + 5).logits, wanted, rtol=1e-4, atol=1e-5
    )
