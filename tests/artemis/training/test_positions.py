"""How long a sequence a model takes: what a forward says."""

import pytest
import torch
import transformers

from artemis.training.positions import learned_positions
from tests.artemis.models import TOKENS, gpt2, llama

SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **TOKENS)


def opt():
    config = transformers.OPTConfig(
        ffn_dim=48, max_position_embeddings=20, word_embed_proj_dim=32, **SMALL
    )
    return transformers.OPTForCausalLM(config)


def roberta():
    config = transformers.RobertaConfig(
        intermediate_size=48, max_position_embeddings=20, is_decoder=True,
        **SMALL | {"pad_token_id": 1, "bos_token_id": 0},
    )  # fmt: skip
    return transformers.RobertaForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48,
        max_position_embeddings=20, **TOKENS,
    )  # fmt: skip
    return transformers.BartForCausalLM(config)


@pytest.mark.parametrize(
    "make, most",
    [(gpt2, 32), (opt, 20), (roberta, 18), (bart, 20)],
    ids=["gpt2", "opt", "roberta", "bart"],
)
def test_the_last_position_that_was_learned(make, most):
    model = make().eval()
    assert learned_positions(model) == most
    with torch.inference_mode():
        model(torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 5))


def test_rotary_models_run_on():
    model = llama(max_position_embeddings=8)
    assert learned_positions(model) is None
    model(torch.full((1, 9), 5))


def test_a_vocabulary_is_not_taken_for_positions():
    assert learned_positions(llama(max_position_embeddings=64, vocab_size=64)) is None
    untied = llama(max_position_embeddings=63, tie_word_embeddings=False)
    assert learned_positions(untied) is None


def test_a_model_that_states_no_length():
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, **TOKENS)
    assert learned_positions(transformers.BloomForCausalLM(config)) is None
