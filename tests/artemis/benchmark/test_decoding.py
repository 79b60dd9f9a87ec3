"""Decoding as it is timed: the right tokens, each time from the same place."""

import pytest
import torch

from artemis.attention import NAME
from artemis.benchmark.arms import base_of
from artemis.benchmark.decoding import NEW_TOKENS, Token
from artemis.benchmark.models import Architecture, Cell, build, random_tokens
from artemis.benchmark.steps import Step, TrainingStep, prepare


@pytest.mark.parametrize("arm", ["full-bf16", "peft", "hybrid-int8"])
def test_a_token_over_a_static_cache_is_the_one_that_follows(arm):
    """Truth: the whole sequence at once. Every call decodes the next one; `rewind` starts anew."""
    step = prepare(Step("decode", arm, Cell("64x2", 2, 96, 3, 16, True))).step
    token, last = Token(step), step.batch[:, -1:]
    with torch.inference_mode():
        whole = torch.cat([step.batch, *[last] * NEW_TOKENS], dim=1)
        truth = step.model(input_ids=whole).logits[:, -NEW_TOKENS:].float()
    for _ in range(2):
        token.rewind()
        found = torch.cat([token().float() for _ in range(NEW_TOKENS)], dim=1)
        assert (found - truth).norm() < 0.03 * truth.norm()
        assert (found[:, 0] - truth[:, -1]).norm() > 0.1 * truth[:, -1].norm()


def test_a_run_decodes_as_many_tokens_from_the_same_place_each_time():
    step = prepare(Step("decode", "hybrid", Cell("64x2", 2, 96, 3, 16, True))).step
    token, lengths = Token(step), []
    forward = step.model.forward

    def watched(**arguments):
        lengths.append(int(arguments["past_key_values"].get_seq_length()))
        return forward(**arguments)

    step.model.forward = watched
    token.run()
    token.run()
    assert lengths == list(range(16, 16 + NEW_TOKENS)) * 2


@pytest.mark.parametrize(
    ("dtype", "key_value_heads", "used"),
    [(torch.bfloat16, 4, "eager"), (torch.bfloat16, 2, "sdpa"), (torch.float32, 4, "sdpa")],
)
def test_single_rows_are_not_multiplied_by_the_fused_attention(dtype, key_value_heads, used):
    """A prompt of more than 256 tokens is read by it; then it is slow where no keys are shared."""
    sizes = Architecture(64, 96, 1, 64, heads=4, key_value_heads=key_value_heads)
    model, read = build(sizes, dtype, 400).eval(), []
    step = TrainingStep(model, random_tokens(64, 1, 300))
    forward = model.forward

    def watched(**arguments):
        read.append(model.config._attn_implementation)
        return forward(**arguments)

    model.forward = watched
    Token(step)()
    assert read == ["sdpa", used]


def test_a_fused_model_decodes_by_our_attention():
    step = prepare(Step("decode", "full-bf16-fused", Cell("64x2", 2, 96, 1, 300, True))).step
    Token(step)
    assert base_of(step.model).config._attn_implementation == NAME


def test_peft_decodes_by_the_same_attention():
    step = prepare(Step("decode", "peft", Cell("64x2", 2, 96, 1, 300, True))).step
    Token(step)
    assert base_of(step.model).config._attn_implementation == "eager"
