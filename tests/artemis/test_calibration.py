"""What an error in a column counts: the mean square of what real tokens bring there."""

import pytest
import torch

from artemis.quantization.calibrate import column_importance
from tests.artemis.models import bert, tokens


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
