"""Steps: what they train, how they are counted, and what the gate refuses."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from artemis import AdapterError
from artemis.benchmark import accuracy
from artemis.benchmark.arms import ARMS, TrainingStep, base_of, hybrid
from artemis.benchmark.flops import training_flops
from artemis.benchmark.models import Cell, architecture, build, random_tokens
from artemis.benchmark.steps import Step, check, prepare
from artemis.fusing import is_fused
from artemis.training import loss

CELL = Cell("64x2", 2, 96, 2, 16, whole=True)
ADAPTERS = [name for name, arm in ARMS.items() if not arm.is_full]


@pytest.mark.parametrize("arm", ADAPTERS)
@pytest.mark.parametrize("workload", ["train", "decode"])
def test_the_gate_passes_every_arm(arm, workload):
    if workload == "train" and not ARMS[arm].trains:
        pytest.skip("measured at inference only")
    step = Step(workload, arm, CELL)
    assert check(step, prepare(step)).passed


def test_tokens_are_drawn_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        tokens = random_tokens(96, 2, 16)
    assert torch.equal(tokens, random_tokens(96, 2, 16))


def forget_input_gradients(model: nn.Module) -> None:
    """Cut the gradient through every down projection's base, as a wrong fast step might."""
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


@pytest.mark.parametrize("tolerance", [None, 0.25])
def test_the_gate_refuses_a_step_that_drops_dx(tolerance):
    """Also with the wide tolerance of an arm that rounds its base."""

    def step(impl=None) -> TrainingStep:
        model = hybrid(build(CELL.architecture, torch.float32, 32), impl=impl)
        return TrainingStep(model, random_tokens(96, 2, 16))

    def verdict(training: TrainingStep) -> accuracy.Verdict:
        reference = lambda: step(impl="reference")  # noqa: E731
        return accuracy.check(training, reference, torch.float32, tolerance=tolerance)

    right, wrong = step(), step()
    forget_input_gradients(wrong.model)
    assert verdict(right).passed
    assert not verdict(wrong).passed


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_gate_allows_what_its_rule_says(share):
    """Of 10,000 numbers: 1.25 · 1.06 of the composed error, and a quarter of eps."""
    truth = torch.ones(100, 100, dtype=torch.float64)
    composed, eps = 1e-3, 1e-4
    error = share * (1.325 * composed + eps / 4)
    given = ({"down:layer": truth * (1 + off)} for off in (error, composed))
    verdict = accuracy.compare(*given, {"down:layer": truth}, eps)
    assert verdict.ratio == pytest.approx(share) and verdict.passed == (share < 1)


def test_the_gate_refuses_a_wrong_loss(monkeypatch):
    right = loss.causal_loss
    monkeypatch.setattr(loss, "causal_loss", lambda *args, **kwargs: 1.5 * right(*args, **kwargs))
    step = Step("train", "hybrid", CELL)
    assert not check(step, prepare(step)).passed


def test_a_part_is_trained_down_to_its_input():
    """Where nothing below the first layer learns, its projections still compute dX."""
    cell = Cell("64x2", 1, 96, 2, 16, whole=False)
    training = prepare(Step("train", "hybrid", cell)).step
    seen = []
    query = training.model.model.layers[0].self_attn.q_proj
    query.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0]))
    training.backward()
    assert seen[0].any()


def test_no_layers_and_a_frozen_base_still_run_a_backward():
    prepared = prepare(Step("train", "hybrid", Cell("64x2", 0, 96, 2, 16, whole=False)))
    prepared.run()
    assert prepared.step.trained_parameters == 0


def test_states_are_weights_gradients_and_moments():
    prepared = prepare(Step("memory", "full-fp32", CELL))
    prepared.run()
    count = sum(p.numel() for p in prepared.step.model.parameters())
    assert prepared.step.state_bytes == pytest.approx(16 * count, rel=1e-2)  # and step counts


@pytest.mark.parametrize("arm", ["full-fp32", "peft"])
def test_flops_are_those_of_the_step_itself(arm):
    """Counted on the meta device from one and two layers, against the running model of three."""
    sizes = architecture("64x3")
    cell = Cell("64x3", 3, sizes.vocabulary, 2, 16, whole=True)
    training = prepare(Step("train", arm, cell)).step
    training.model.config._attn_implementation = "eager"  # attention's products in the open
    with FlopCounterMode(display=False) as counter:
        training.backward()
    assert training_flops(arm, sizes, 2, 16) == counter.get_total_flops()


def test_full_fine_tuning_in_int8_multiplies_every_layer_but_the_head_so():
    pytest.importorskip("torchao")
    plain, rounded = (prepare(Step("train", arm, CELL)).step for arm in ("full-bf16", "full-int8"))
    for training in (plain, rounded):
        training.backward()
    names = [name for name, _ in plain.model.named_parameters()]
    pairs = zip(plain.trained, rounded.trained, strict=True)
    errors = [((b.grad - a.grad).norm() / a.grad.norm()).item() for a, b in pairs]
    assert all(0 < error < 0.15 for error in errors), dict(zip(names, errors, strict=True))
    layers = [m for n, m in rounded.model.named_modules() if n.endswith("_proj")]
    assert len(layers) == 14 and nn.Parameter not in {type(m.weight) for m in layers}
    assert type(rounded.model.lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("arm", ["full-bf16", "peft", "hybrid-int8"])
def test_fused_arms_run_our_operations_and_the_others_transformers_own(arm):
    for name, fused in ((arm, False), (f"{arm}-fused", True)):
        model = prepare(Step("train", name, CELL)).step.model
        norms = [m for n, m in model.named_modules() if n.endswith("norm")]
        assert norms and all(is_fused(norm) == fused for norm in norms)
        assert (base_of(model).config._attn_implementation == "artemis") == fused


def test_a_base_in_fp8_is_measured_by_default_where_there_is_a_gpu(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert ARMS["hybrid-fp8"].installed == there
    monkeypatch.undo()
    step = Step("train", "hybrid-fp8", CELL)
    prepared = prepare(step)
    assert check(step, prepared).passed
    layers = [m for n, m in prepared.step.model.named_modules() if n.endswith("_proj")]
    assert {layer.weight.format for layer in layers} == {"fp8"}


def test_full_fine_tuning_in_int8_needs_torchao(monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("torchao.")]
    for name in ("torchao", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    assert not ARMS["full-int8"].installed
    with pytest.raises(AdapterError, match="needs torchao"):
        prepare(Step("train", "full-int8", CELL))
    sizes = architecture("64x3")
    assert training_flops("full-int8", sizes, 2, 16) == training_flops("full-bf16", sizes, 2, 16)


@pytest.mark.parametrize("arm", ["full-bf16", "hybrid"])
def test_checkpointing_runs_every_layer_once_more_and_changes_no_gradient(arm):
    """And that is counted: the layers' forward comes on top, the head's does not."""
    sizes = replace(architecture("64x3"), vocabulary=96)
    cell = Cell("64x3", 3, sizes.vocabulary, 2, 16, whole=True)
    calls, gradients = [], []
    for name in (arm, f"{arm}-checkpointed"):
        model = (training := prepare(Step("train", name, cell)).step).model
        count = []
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(0)  # of the dropout masks
        training.backward()
        calls.append(len(count))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert calls == [3, 6]
    assert all(torch.equal(gradients[0][name], again) for name, again in gradients[1].items())

    model = build(cell.architecture, torch.bfloat16, 32)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.model(random_tokens(96, 2, 16))  # all but the head
    plain, again = (training_flops(n, sizes, 2, 16) for n in (arm, f"{arm}-checkpointed"))
    # What a layer's last product gives, no gradient needs.
    forward = counter.get_total_flops() - 3 * 2 * 32 * sizes.intermediate * sizes.hidden
    more = again - plain
    if arm == "full-bf16":  # older transformers multiply for the rotary angles, once a model
        assert more == pytest.approx(forward, rel=2e-4)
    else:
        assert more > forward  # adapters
