"""Training as torch does it: checkpointing, accumulation, autocast, several processes."""

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.artemis.models import (
    adapted,
    bert,
    enable_checkpointing,
    gpt2,
    gradients,
    llama,
    t5,
    tokens,
)

BERT = dict(target_modules=["query", "key", "value", "intermediate.dense"])
BERT["apply_lora_to"] = ["query", "key", "value"]
GPT2 = dict(target_modules=["c_attn", "c_fc"], apply_lora_to=["c_attn"])
T5 = dict(target_modules=["q", "k", "v", "wi"], apply_lora_to=["q", "k", "v"])
DROPOUT = dict(lora_dropout=0.2, adapter_dropout=0.2)
MODELS = [
    pytest.param(llama, {}, id="llama"),
    pytest.param(llama, dict(target_modules=["q_proj", "mlp"]), id="llama-blocks"),
    pytest.param(gpt2, GPT2, id="gpt2"),
    pytest.param(bert, BERT, id="bert"),
    pytest.param(t5, T5, id="t5"),
]


def loss_of(model, ids):
    labels = torch.tensor([0, 2]) if hasattr(model.config, "problem_type") and hasattr(
        model, "classifier") else ids  # fmt: skip
    return model(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("build, settings", MODELS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient_with_dropout_on(build, settings, reentrant):
    model, ids = adapted(build(), **settings, **DROPOUT).train(), tokens()
    torch.manual_seed(5)
    plain_loss = loss_of(model, ids)
    plain_loss.backward()
    expected = gradients(model)
    model.zero_grad()

    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss = loss_of(model, ids)
    loss.backward()
    assert torch.equal(loss, plain_loss)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("build, settings", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient_from_the_second_step_on(build, settings, checkpointing):
    """At the first step B and up are zero, and with them the gradients of A and down."""
    model, ids = adapted(build(), fill=False, **settings, **DROPOUT).train(), tokens(4, 12)
    if checkpointing:
        enable_checkpointing(model)
    if "classifier" in dict(model.named_children()):
        ids = tokens(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        if step > 0:
            dead = [
                name
                for name, p in model.named_parameters()
                if p.requires_grad and (p.grad is None or not p.grad.any())
            ]
            assert dead == [], f"step {step}"
        optimizer.step()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_two_forwards_before_a_backward_keep_their_own_masks():
    model, ids = adapted(llama(), **DROPOUT).train(), [tokens(), tokens()]
    torch.manual_seed(5)
    expected = []
    for batch in ids:
        model.zero_grad()
        loss_of(model, batch).backward()
        expected.append(gradients(model))
    model.zero_grad()
    torch.manual_seed(5)
    losses = [loss_of(model, batch) for batch in ids]
    sum(losses).backward()
    for name, gradient in gradients(model).items():
        want = expected[0][name] + expected[1][name]
        torch.testing.assert_close(
            gradient, want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_checkpointed_forwards_before_a_backward_keep_their_own_masks():
    model, ids = adapted(llama(), **DROPOUT).train(), [tokens(), tokens()]

    def total():
        torch.manual_seed(5)
        model.zero_grad()
        sum([loss_of(model, batch) for batch in ids]).backward()
        return gradients(model)

    expected = total()
    enable_checkpointing(model)
    for name, gradient in total().items():
        torch.testing.assert_close(
            gradient,
            expected[name],
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_autocast_computes_in_its_dtype_and_gives_fp32_gradients():
    model, ids = adapted(llama()).train(), tokens()
    exact = loss_of(model.eval(), ids).item()
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.model.layers[0].self_attn.q_proj
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16
        loss = loss_of(model, ids)
    loss.backward()
    assert abs(loss.item() - exact) < 0.05
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_gradients_equal_finite_differences_in_fp64():
    model = adapted(bert(num_hidden_layers=1), **BERT).double()  # Llama's norms compute in fp32
    ids, weights = tokens(), torch.randn(2, 3, dtype=torch.float64)

    def loss():
        return (model(ids).logits * weights).sum()

    loss().backward()
    for name, gradient in gradients(model).items():
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        slopes = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                parameter.add_(step * direction)
                slopes.append(loss().item())
                parameter.sub_(step * direction)
        numeric = (slopes[0] - slopes[1]) / 2e-5
        assert numeric == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7), (
            name
        )


def test_compiled_without_a_graph_break():
    model, ids = adapted(llama(), **DROPOUT).train(), tokens()
    torch.manual_seed(5)
    expected = model(ids).logits
    torch.manual_seed(5)
    torch._dynamo.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    got = model.lm_head(compiled(ids, use_cache=False)[0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _distributed_step(rank: int, meeting: Path, model, ids, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    wrapped(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
    results[rank] = gradients(wrapped.module)
    torch.distributed.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    """Shared tensors included: DDP gives the mean of the two processes' own gradients."""
    model, ids = adapted(llama(), adapter_dropout=0.0).train(), tokens()
    expected = []
    for row in ids.split(1):
        model.zero_grad()
        loss_of(model, row).backward()
        expected.append(gradients(model))
    model.zero_grad()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_distributed_step, (tmp_path / "meeting", model, ids, results), nprocs=2)
        for got in (results[0], results[1]):
            assert got.keys() == expected[0].keys()
            for name, gradient in got.items():
                mean = (expected[0][name] + expected[1][name]) / 2
                torch.testing.assert_close(
                    gradient,
                    mean,
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
