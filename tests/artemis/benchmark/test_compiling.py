"""Steps under `torch.compile`: judged by the gate, in turns, and nothing compiled while timed."""

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from artemis.benchmark import steps, worker
from artemis.benchmark.arms import ARMS
from artemis.benchmark.compiling import make_room_for_graphs, nothing_compiled
from artemis.benchmark.models import Cell
from artemis.benchmark.steps import Step, check, prepare
from artemis.training.compiling import can_compile

CELL = Cell("64x1", 1, 96, 2, 16, whole=True)
COMPILED = [
    name for name, arm in ARMS.items() if arm.trains and arm.installed and not arm.recomputes
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch):
    """Whole graphs and their guards as in earnest, without code to wait for."""
    monkeypatch.setattr(
        steps,
        "compile_model",
        lambda model: model.compile(fullgraph=True, dynamic=False, backend="aot_eager"),
    )


def job(workload_steps: list[Step]) -> dict:
    check = [n for n, step in enumerate(workload_steps) if not ARMS[step.arm].is_full]
    written = [step.to_dict() for step in workload_steps]
    return {"steps": written, "check": check, "rounds": 2, "warmup": 1}


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the step would run on the GPU")
def test_the_gate_judges_the_compiled_step():
    """Its generated code, and with the dropout masks that the references draw."""
    step = Step("train", "hybrid", CELL, compiled=True)
    prepared = prepare(step)
    assert check(step, prepared).passed
    with nothing_compiled():  # what was judged is what will run
        prepared.run()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("arm", COMPILED)
def test_every_arm_is_one_graph_that_serves_all_rounds(arm):
    lines = list(worker.run(job([Step("train", arm, CELL, compiled=True)])))
    assert sum("ms" in line for line in lines) == 2
    assert all(line["gate"]["passed"] for line in lines if "gate" in line)


@pytest.mark.usefixtures("traced")
def test_graphs_of_all_models_count_together():
    """Where there is no room for one more, the run fails; no arm goes on without the compiler."""
    cells = [Cell("64x1", 0, 96, batch, 16, whole=False) for batch in (1, 2, 3)]
    wanted = [Step("train", "full-bf16", cell, compiled=True) for cell in cells]
    with torch.compiler.config.patch(recompile_limit=2):
        with pytest.raises(FailOnRecompileLimitHit):
            list(worker.run(job(wanted)))
        torch.compiler.reset()
        make_room_for_graphs()
        lines = list(worker.run(job(wanted)))
    timed = [line["step"] for line in lines if "ms" in line]
    assert sorted(timed) == sorted(2 * list(range(len(cells))))


@pytest.mark.usefixtures("traced")
def test_nothing_is_compiled_in_a_timed_round():
    prepared = prepare(Step("train", "full-bf16", CELL, compiled=True))
    with nothing_compiled(), pytest.raises(RuntimeError, match="fail_on_recompile"):
        prepared.run()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("arm", ["hybrid", "peft"])
def test_a_compiled_part_is_trained_down_to_its_input(arm):
    """Its graph holds the first projections' dX, which no parameter's gradient needs."""
    part = Cell("64x2", 1, 96, 2, 16, whole=False)
    eager, compiled = (prepare(Step("train", arm, part, mode)).step for mode in (False, True))
    inputs = []
    embeddings = eager.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: inputs.append(output))
    for training in (eager, compiled):
        torch.manual_seed(3)  # of the dropout masks
        training.backward()
    (hook,) = compiled.model.get_input_embeddings()._forward_hooks.values()
    (leaf,) = hook.args
    torch.testing.assert_close(leaf.grad, inputs[0].grad.sum())


def test_a_step_tells_how_it_runs():
    eager, compiled = (Step("train", "hybrid", CELL, mode) for mode in (False, True))
    assert "compiled" not in eager.to_dict()  # so that older results still stand for it
    for step in (eager, compiled):
        assert Step.from_dict(step.to_dict()) == step
    assert "compiled" in str(compiled) and "compiled" not in str(eager)
