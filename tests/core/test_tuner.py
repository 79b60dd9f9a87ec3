"""Measured choices: what is kept, what is read, and that dispatch follows it."""

import json

import pytest
import torch

import artemis_kernels
from artemis.cli import main
from artemis_kernels import tuner
from artemis_kernels.core import cpu_tables
from artemis_kernels.core.cpu_tables import Case
from artemis_kernels.ops.adapter_linear.op import fold_or_plain

CASE = Case("adapter_linear", 32, 64, 96, 8, "float32", True)
USUAL = fold_or_plain(*CASE[1:5], True)[0]
OTHER = {"folded": "plain", "plain": "folded"}[USUAL]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Tables of this test alone."""
    monkeypatch.setattr(cpu_tables, "USER_TABLES", tmp_path / "user")
    monkeypatch.setattr(cpu_tables, "SHIPPED_TABLES", tmp_path / "shipped")
    cpu_tables.reload()
    yield
    cpu_tables.reload()


def user():
    return cpu_tables.path_of(cpu_tables.USER_TABLES)


def timer(usual: float, other: float):
    return lambda case, rounds: {USUAL: usual, OTHER: other}


def explained(rows: int, dtype=torch.float32, trains=True, out=96):
    one = torch.zeros(1, 1, dtype=dtype)
    down = torch.zeros(8, out).requires_grad_(trains)
    return artemis_kernels.explain(
        "adapter_linear", one.expand(rows, 64), one.expand(out, 64), down, torch.zeros(out, 8)
    )


@pytest.mark.parametrize(("usual", "kept"), [(1.06, True), (1.05, False), (0.9, False)])
def test_only_wins_beyond_the_margin_are_kept(usual, kept):
    found = tuner.search((CASE,), user(), 3, False, timer(usual, 1.0))
    assert found["choices"] == ({CASE.key: OTHER} if kept else {})
    assert found["measured"] == {CASE.key: {USUAL: usual, OTHER: 1.0}}
    assert cpu_tables.read(user()) == found


def test_dispatch_follows_the_table_for_its_cases_alone():
    assert explained(32).strategy == USUAL and "tuned" not in explained(32).reason
    tuner.search((CASE,), user(), 3, False, timer(2.0, 1.0))
    for rows in (17, 32):
        choice = explained(rows)
        assert choice.strategy == OTHER and "tuned" in choice.reason and "user's" in choice.reason
    others = (
        explained(16), explained(33), explained(32, torch.bfloat16), explained(32, trains=False),
        explained(32, out=97),
    )  # fmt: skip
    assert not any("tuned" in other.reason for other in others)


def test_the_tuned_strategy_is_what_runs(monkeypatch):
    from artemis_kernels.ops.adapter_linear import op

    tuner.search((CASE,), user(), 3, False, timer(2.0, 1.0))
    taken, operator = [], op._operator
    monkeypatch.setattr(op, "_operator", lambda *a: taken.append(a[13]) or operator(*a))
    x, weight = torch.randn(32, 64), torch.randn(96, 64)
    down = torch.randn(8, 96, requires_grad=True)
    artemis_kernels.adapter_linear(x, weight, down, torch.randn(96, 8))
    assert taken == [OTHER]
    compiled = torch.compile(
        lambda x: artemis_kernels.adapter_linear(x, weight, down, torch.ones(96, 8)),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    compiled(x).sum().backward()
    assert down.grad is not None


def test_the_users_table_overrides_the_shipped_one():
    shipped = cpu_tables.path_of(cpu_tables.SHIPPED_TABLES)
    times = {CASE.key: {USUAL: 2.0, OTHER: 1.0}}
    cpu_tables.write(shipped, {"measured": times, "choices": {CASE.key: OTHER}})
    cpu_tables.reload()
    assert explained(32).strategy == OTHER and "shipped" in explained(32).reason
    cpu_tables.write(user(), {"measured": times, "choices": {CASE.key: USUAL}})
    cpu_tables.reload()
    assert explained(32).strategy == USUAL and "user's" in explained(32).reason


def test_an_interrupted_run_goes_on():
    second, timed = CASE._replace(rows=64), []

    def interrupted(case, rounds):
        timed.append(case)
        if case == second and timed.count(second) == 1:
            raise KeyboardInterrupt
        return {USUAL: 2.0, OTHER: 1.0}

    with pytest.raises(KeyboardInterrupt):
        tuner.search((CASE, second), user(), 3, False, interrupted)
    assert set(cpu_tables.read(user())["choices"]) == {CASE.key}
    tuner.search((CASE, second), user(), 3, False, interrupted)
    assert timed == [CASE, second, second]
    assert set(cpu_tables.read(user())["choices"]) == {CASE.key, second.key}
    assert [path.name for path in user().parent.iterdir()] == [user().name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tuning table"),
        ("[]", "must hold 'measured' and 'choices'"),
        ('{"expand": {}}', "must hold 'measured' and 'choices'"),
        ('{"measured": {"adapter_linear 3 1 1 1 float32": {}}, "choices": {}}', "3 1 1 1 float32'"),
        ('{"measured": {}, "choices": {"other": "plain"}}', "'other' is no key"),
        (json.dumps({"measured": {}, "choices": {CASE.key: "split"}}), "allowed: folded, plain"),
        (json.dumps({"measured": {}, "choices": {CASE.key: "plain"}}), "its times must be"),
    ],
)
def test_a_malformed_table_is_refused_by_name(text, message):
    user().parent.mkdir(parents=True)
    user().write_text(text)
    with pytest.raises(ValueError) as refusal:
        explained(32)
    assert message in str(refusal.value) and str(user()) in str(refusal.value)
    with pytest.raises(ValueError):
        tuner.search((CASE,), user(), 3, False, timer(2.0, 1.0))
    assert user().read_text() == text


def test_a_real_run_and_the_command(tmp_path, capsys):
    found = artemis_kernels.tune([(16, 24, 4)], [5], dtype=torch.float32, rounds=2)
    (times,) = found["measured"].values()
    assert set(times) == {"folded", "plain"} and min(times.values()) > 0
    command = ["tune", "--shapes", "16x24x4", "--rows", "5", "--dtype", "float32"]
    arguments = [*command, "--rounds", "2", "--table", str(tmp_path), "--json"]
    assert main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["measured"]) == ["adapter_linear 8 16 24 4 float32 training"]
    assert main([*command, "--show"]) == 0
    assert "adapter_linear: eager / " in capsys.readouterr().out
    assert main(["tune", "--shapes", "16x24", "--show"]) == 1
    assert "allowed: INxOUTxWIDTH" in capsys.readouterr().err
