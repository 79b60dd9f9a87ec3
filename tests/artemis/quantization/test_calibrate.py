"""What an error in a column counts: the mean square of what real tokens bring there."""

import pytest
import torch

from artemis import AdapterError
from artemis.quantization.calibrate import column_importance
from tests.artemis.models import adapted, bert, t5, tokens


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_mean_square_of_what_is_read_without_padding(padded):
    torch.manual_seed(0)
    model, ids = bert(), tokens(4)
    layer = model.bert.encoder.layer[0].intermediate.dense
    seen = []
    handle = layer.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    model(ids)
    handle.remove()
    batch = {"input_ids": ids}
    if padded:
        rest = torch.zeros(4, 50, dtype=torch.long)
        mask = torch.cat([torch.ones_like(ids), rest], 1)
        batch = {"input_ids": torch.cat([ids, rest], 1), "attention_mask": mask}
    found = column_importance(model, {"layer": layer}, [batch])
    expected = seen[0].detach().double().square().mean((0, 1)).float()
    torch.testing.assert_close(found["layer"], expected, rtol=1e-4, atol=1e-6)


def test_a_model_in_training_is_looked_at_without_its_dropout():
    """And trains on, module by module as it did."""
    torch.manual_seed(0)
    model, batch = bert(hidden_dropout_prob=0.5), {"input_ids": tokens(4)}
    layers = {"layer": model.bert.encoder.layer[1].attention.self.query}
    expected = column_importance(model, layers, [batch])["layer"]
    model.train().bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(column_importance(model, layers, [batch])["layer"], expected)
    assert [module.training for module in model.modules()] == before


def test_it_is_of_all_batches_up_to_16():
    torch.manual_seed(0)
    model = bert()
    layer = model.bert.encoder.layer[1].attention.self.query
    batches = [{"input_ids": tokens(1, 6)} for _ in range(17)]
    each = [column_importance(model, {"layer": layer}, [batch])["layer"] for batch in batches]
    found = column_importance(model, {"layer": layer}, iter(batches))["layer"]
    torch.testing.assert_close(found, torch.stack(each[:16]).mean(0))


def test_of_examples_16_batches_of_8_are_drawn():
    model, read = bert(), []
    layer = model.bert.encoder.layer[0].attention.self.query
    layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    data = [{"input_ids": ids} for ids in tokens(200, 6)]
    for _ in range(2):
        column_importance(model, {"layer": layer}, data)
    assert [len(x) for x in read] == [8] * 32
    drawn = torch.cat(read).unflatten(0, (2, 128))
    assert torch.equal(*drawn) and len(drawn[0].unique(dim=0)) > 100  # the same, each once


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_numbers_that_are_none_are_refused(value):
    """One would drown, or spoil, what all others say of its column."""
    model = bert()
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[3] = value
    layers = {"a.layer": model.bert.encoder.layer[0].attention.self.query}
    with pytest.raises(AdapterError, match=r"data: a\.layer reads inf or nan, allowed: finite"):
        column_importance(model, layers, [{"input_ids": tokens()}])


def test_a_mask_of_another_shape_leaves_nothing_out():
    """The pooler reads one token a sequence."""
    torch.manual_seed(0)
    model, ids = bert(), tokens(4)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    found = column_importance(
        model, {"pooler": model.bert.pooler.dense}, [{"input_ids": ids, "attention_mask": mask}]
    )
    first = model.bert(ids, attention_mask=mask).last_hidden_state[:, 0]
    torch.testing.assert_close(found["pooler"], first.detach().square().mean(0))


#: Layers of T5 and the mask of what they read: the encoder's states, or the decoder's.
READ = {
    "encoder.block.1.layer.1.DenseReluDense.wo": "attention_mask",
    "decoder.block.0.layer.1.EncDecAttention.k": "attention_mask",
    "decoder.block.1.layer.1.EncDecAttention.v": "attention_mask",
    "decoder.block.1.layer.1.EncDecAttention.q": "decoder_attention_mask",
    "decoder.block.0.layer.0.SelfAttention.k": "decoder_attention_mask",
    "decoder.block.1.layer.2.DenseReluDense.wi": "decoder_attention_mask",
    "lm_head": "decoder_attention_mask",
}


def adapted_t5():
    return adapted(t5(), target_modules=["k", "v", "wi"], apply_lora_to=["k", "v"])


@pytest.mark.parametrize("build", [t5, adapted_t5])
@pytest.mark.parametrize("decoder_padded", [False, True])
def test_an_encoder_and_its_decoder_have_masks_of_their_own(decoder_padded, build):
    torch.manual_seed(0)
    model, lengths = build(), {"attention_mask": 3}
    batch = {"input_ids": tokens(2, 8), "decoder_input_ids": tokens(2, 8)}
    if decoder_padded:
        lengths["decoder_attention_mask"] = 6
    for name, length in lengths.items():
        batch[name] = (torch.arange(8) < length).long().expand(2, 8)
    layers = {path: model.get_submodule(path) for path in READ}
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
        for path, layer in layers.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    found = column_importance(model, layers, [batch, batch])
    for path, name in READ.items():
        read = seen[path][:, : lengths.get(name, 8)].double()
        expected = read.square().mean((0, 1)).float()
        torch.testing.assert_close(found[path], expected, rtol=1e-4, atol=1e-6, msg=path)
    assert not model.encoder._forward_hooks
