"""PEFT as an independent oracle: the same A, B and scale give the same logits and gradients."""

import copy

import pytest
import torch

from tests.artemis.models import adapted, gpt2, gradients, llama, tokens

peft = pytest.importorskip("peft")
SCALE = 0.5  # PEFT: alpha / rank = 2 / 4


@pytest.mark.parametrize(
    "build, targets",
    [(llama, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]), (gpt2, ["c_attn", "c_fc"])],
    ids=["llama", "gpt2"],
)
def test_lora_equals_peft(build, targets):
    base, ids = build(), tokens()
    settings = dict(target_modules=targets, apply_lora_to=targets, shared_parameters=False)
    ours = adapted(copy.deepcopy(base), scaling_factor=SCALE, **settings)
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=targets, fan_in_fan_out=build is gpt2
    )
    theirs = peft.get_peft_model(base, config)
    bank, names = ours.hybrid_adapter, {}
    with torch.no_grad():
        for path in bank.sites:
            layer = theirs.base_model.model.get_submodule(path)
            key = path.replace(".", "/")
            for table, linear in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
                linear["default"].weight.copy_(getattr(bank, table)[key])
                names[f"hybrid_adapter.{table}.{key}"] = linear["default"].weight

    loss, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(loss.logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss.loss.backward()
    expected.loss.backward()
    got = gradients(ours)
    assert got.keys() == names.keys()
    for name, parameter in names.items():
        torch.testing.assert_close(
            got[name],
            parameter.grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
