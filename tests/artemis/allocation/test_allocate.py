"""Allocation: budgets and bounds, and what resizing does to the function, file and optimizer."""

import math

import pytest
import torch
from accelerate import Accelerator

from artemis import (
    AdapterError,
    load_hybrid_adapter,
    read_adapter,
    set_dynamic_rank_allocation,
)
from artemis.allocation.transform import permute, rotate
from tests.artemis.models import (
    adapted,
    assert_same_state,
    bert,
    fill_bank,
    gpt2,
    llama,
    snapshot,
    tokens,
)

BOUNDS = dict(min_rank=2, max_rank=12, verbose=False)


def uneven(model, seed: int = 0) -> dict[str, float]:
    """Scores that differ, one of them zero."""
    paths = list(model.hybrid_adapter.sites)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(paths), generator=generator).square().tolist()
    return dict(zip(paths, scores, strict=True)) | {paths[3]: 0.0}


def sizes(model) -> dict[str, int]:
    return {path: site.spec.size for path, site in model.hybrid_adapter.sites.items()}


def cost(model) -> int:
    """Parameters of units as if nothing were shared, from the definition."""
    total = 0
    for site in model.hybrid_adapter.sites.values():
        spec = site.spec
        if spec.kind == "lora":
            total += spec.size * (spec.in_features + spec.out_features)
        else:
            total += spec.size * (2 * spec.out_features + 1)
    return total


def product(model, path: str) -> torch.Tensor:
    """A LoRA module's update `gain · B A`, fp64."""
    bank, site = model.hybrid_adapter, model.hybrid_adapter.sites[path]
    tensors = {name: t.detach().double() for name, t in bank.tensors(site.layout).items()}
    return tensors.get("gain", torch.tensor(1.0)) * tensors["lora_b"] @ tensors["lora_a"]


@pytest.mark.parametrize("shared", [True, False])
def test_the_default_budget_is_that_of_the_uniform_configuration(shared):
    model = adapted(llama(), shared_parameters=shared)
    uniform = cost(model)
    report = set_dynamic_rank_allocation(model, uneven(model), **BOUNDS)
    dearest = max(m.cost // m.after for m in report.modules)
    assert report.budget == uniform
    assert report.cost == cost(model) and uniform - dearest < report.cost <= uniform
    assert len(set(sizes(model).values())) > 3
    for module in report.modules:
        assert (2 if module.kind == "lora" else 4) <= module.after
        assert module.after <= (12 if module.kind == "lora" else 24)
        assert sizes(model)[module.path] == module.after
    assert report.stored == sum(p.numel() for p in model.hybrid_adapter.parameters())


@pytest.mark.parametrize("build", [llama, gpt2, bert])
@pytest.mark.parametrize("shared", [True, False])
def test_growing_keeps_the_function(build, shared):
    names = {
        gpt2: dict(target_modules=["attn.c_attn", "mlp.c_fc"], apply_lora_to=["attn.c_attn"]),
        bert: dict(target_modules=["query", "intermediate.dense"], apply_lora_to=["query"]),
    }
    model = adapted(build(), shared_parameters=shared, **names.get(build, {}))
    x = tokens()
    before = model(x).logits
    report = set_dynamic_rank_allocation(
        model, uneven(model), 4, 16, budget=2 * cost(model), verbose=False
    )
    torch.testing.assert_close(model(x).logits, before, rtol=1e-5, atol=1e-5)
    assert all(m.after >= m.before and m.error == 0 for m in report.modules)
    bank = model.hybrid_adapter
    for site in bank.sites.values():  # a new unit can learn: not both of its sides are zero
        tensors = bank.tensors(site.layout)
        reads = tensors["lora_a"] if site.spec.kind == "lora" else tensors["down"]
        assert reads.abs().sum(1).min() > 0


def test_an_unshared_cut_is_the_best_approximation():
    model = adapted(llama(), shared_parameters=False)
    paths = [p for p, site in model.hybrid_adapter.sites.items() if site.spec.kind == "lora"]
    before = {path: product(model, path) for path in paths}
    budget = 3 * cost(model) // 4
    report = set_dynamic_rank_allocation(model, uneven(model), 2, 4, budget=budget, verbose=False)
    cut = 0
    for module in report.modules:
        if module.path not in before:
            continue
        values = torch.linalg.svdvals(before[module.path])
        optimum = values[module.after :].square().sum().sqrt()
        error = (product(model, module.path) - before[module.path]).norm()
        torch.testing.assert_close(error, optimum, rtol=1e-4, atol=1e-5)
        assert module.error == pytest.approx((optimum / values.norm()).item(), abs=1e-5)
        cut += module.after < module.before
    assert cut


def test_a_shared_cut_beats_the_plain_one_and_spares_the_others():
    model = adapted(llama(num_hidden_layers=4), lora_rank=8, adapter_size=16)
    scores = {p: 1.0 if ".0." in p or ".1." in p else 0.1 for p in model.hybrid_adapter.sites}
    paths = [p for p, site in model.hybrid_adapter.sites.items() if site.spec.kind == "lora"]
    before = {path: product(model, path) for path in paths}
    bank = model.hybrid_adapter
    plain = {}
    for path in paths:
        tensors = bank.tensors(bank.sites[path].layout)
        b, a = tensors["lora_b"].double(), tensors["lora_a"].double()
        plain[path] = (tensors["gain"] * b[:, 2:] @ a[2:]).norm().item()
    budget = 5 * cost(model) // 8
    report = set_dynamic_rank_allocation(model, scores, 2, 8, budget=budget, verbose=False)
    lost = gained = 0.0
    for module in report.modules:
        if module.kind != "lora":
            continue
        error = (product(model, module.path) - before[module.path]).norm()
        assert module.error == pytest.approx((error / before[module.path].norm()).item(), abs=1e-5)
        if module.after == 8:
            assert module.error < 1e-6  # the bank was rotated, and B made up for it
        elif module.after == 2:
            lost, gained = lost + error.item() ** 2, gained + plain[module.path] ** 2
    assert 0 < lost < 0.9 * gained


@pytest.mark.parametrize("lives_by", ["down", "bias_down"])
def test_a_cut_bottleneck_keeps_its_strongest_units(lives_by):
    model = adapted(llama(), shared_parameters=False, activation="relu", lora_rank=4)
    bank = model.hybrid_adapter
    path = "model.layers.0.mlp.up_proj"
    key = bank.sites[path].spec.own_key
    with torch.no_grad():  # unit 6 is strong, 1 weaker, the others nothing
        strength = torch.tensor([0.0, 0.5, 0, 0, 0, 0, 2.0, 0])
        bank.up[key].copy_(torch.randn_like(bank.up[key]) * strength)
        if lives_by == "bias_down":  # the same output whatever it reads
            bank.down[key][6], bank.bias_down[key][6] = 0.0, 3.0
    x = tokens()
    logits = model(x).logits
    scores = dict.fromkeys(bank.sites, 1.0) | {path: 0.0}
    least = cost(model) - 6 * (2 * 48 + 1)  # what two units of it leave
    report = set_dynamic_rank_allocation(
        model, scores, 1, 4, min_width=2, max_width=8, budget=least, verbose=False
    )
    module = next(m for m in report.modules if m.path == path)
    assert (module.before, module.after, module.error) == (8, 2, 0.0)
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-5, atol=1e-5)


def test_shared_units_are_permuted_for_all_and_the_uncut_keep_their_function():
    model = adapted(llama(), target_modules=["q_proj", "up_proj"], apply_lora_to=["q_proj"])
    bank = model.hybrid_adapter
    cut, kept = (p for p in bank.sites if p.endswith("up_proj"))
    with torch.no_grad():
        bank.up["up_proj/32x48"][:, :4] *= 0.01  # the leading units are the weak ones
        bank.gain[bank.sites[cut].spec.own_key].fill_(1e-3)
    scores = dict.fromkeys(bank.sites, 1.0) | {cut: 0.0}
    x = tokens()
    before = model(x).logits
    budget = cost(model) - 4 * (2 * 48 + 1)
    report = {m.path: m for m in set_dynamic_rank_allocation(
        model, scores, 2, 4, min_width=4, max_width=8, budget=budget, verbose=False
    ).modules}  # fmt: skip
    assert (report[cut].after, report[kept].after) == (4, 8)
    assert 0 < report[cut].error < 0.1 and report[kept].error == 0
    torch.testing.assert_close(model(x).logits, before, rtol=1e-3, atol=1e-3)


def test_growing_over_units_that_others_trained_is_reported():
    model = adapted(llama(), target_modules=["up_proj"], apply_lora_to=[])
    first, second = model.hybrid_adapter.sites
    small = dict(min_width=2, max_width=8, verbose=False)
    unit = 2 * 48 + 1
    set_dynamic_rank_allocation(model, {first: 0.0, second: 1.0}, budget=10 * unit, **small)
    assert list(sizes(model).values()) == [2, 8]
    fill_bank(model)
    report = set_dynamic_rank_allocation(
        model, {first: 1.0, second: 1.0}, budget=16 * unit, **small
    )
    assert report.modules[0].after > report.modules[0].before
    assert report.modules[0].error > 0 and report.modules[1].error == 0


def test_units_that_come_from_nothing_are_an_error_of_one():
    """Nobody's units that were zero: the first module takes one that the second trained."""
    strength = torch.tensor([[0.0, 0.0, 3.0, 1.0]] * 2)
    assert permute(strength, [2, 4], [3, 4], [1.0, 1.0]).errors == [1.0, 0.0]
    assert permute(strength, [2, 4], [2, 4], [1.0, 1.0]).errors == [0.0, 0.0]


@pytest.mark.parametrize("shared", [True, False])
def test_memory_is_freed(shared):
    model = adapted(llama(), shared_parameters=shared, lora_rank=8, adapter_size=32)
    bank = model.hybrid_adapter

    def held() -> int:
        return sum(p.untyped_storage().nbytes() for p in bank.parameters())

    before = held()
    least = cost(model) // 4
    report = set_dynamic_rank_allocation(
        model, dict.fromkeys(bank.sites, 1.0), 2, 8, budget=least, verbose=False
    )
    own = report.stored - report.cost if not shared else 0
    assert held() == 4 * report.stored < before / 2 + 4 * abs(own)
    assert set(sizes(model).values()) == {2, 8}


@pytest.mark.parametrize("shared", [True, False])
def test_saved_and_loaded(tmp_path, shared):
    model = adapted(llama(), shared_parameters=shared)
    set_dynamic_rank_allocation(model, uneven(model), **BOUNDS)
    fill_bank(model)
    x = tokens()
    model.save_adapter_parameters(tmp_path)
    base = llama()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "hybrid" not in k})
    other = load_hybrid_adapter(base, tmp_path)
    assert sizes(other) == sizes(model)
    assert torch.equal(other(x).logits, model(x).logits)
    assert {m.path: m.size for m in read_adapter(tmp_path).modules()} == sizes(model)


def train(model, optimizer, steps: int) -> float:
    torch.manual_seed(1)
    batch = tokens(4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, dict(amsgrad=True)),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.SGD, dict(momentum=0.9)),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, dict(lr=3.0)),
        (torch.optim.RMSprop, dict(lr=1e-3, momentum=0.5, centered=True)),
    ],
)
def test_training_goes_on(shared, kind, options):
    model = adapted(llama(), fill=False, shared_parameters=shared)
    optimizer = kind(model.hybrid_adapter.parameters(), **dict(lr=1e-2) | options)
    before = train(model, optimizer, 4)
    set_dynamic_rank_allocation(model, uneven(model), optimizer=optimizer, **BOUNDS)
    for parameter, state in optimizer.state.items():
        kept = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim()]
        assert all(value.shape == parameter.shape for value in kept)
        assert all(tensor.is_contiguous() for tensor in (parameter, *kept))
    assert train(model, optimizer, 8) < before


@pytest.mark.parametrize("shared", [True, False])
def test_a_growing_allocation_leaves_the_trajectory_of_the_old_units(shared):
    """With momentum, the next update of old units is what it would have been."""
    outcomes = []
    for grow in (False, True):
        torch.manual_seed(0)
        model = adapted(llama(), fill=False, shared_parameters=shared)
        optimizer = torch.optim.AdamW(model.hybrid_adapter.parameters(), lr=1e-2)
        train(model, optimizer, 3)
        if grow:
            scores = dict.fromkeys(model.hybrid_adapter.sites, 1.0)
            set_dynamic_rank_allocation(
                model, scores, 4, 8, budget=2 * cost(model), optimizer=optimizer, verbose=False
            )
        train(model, optimizer, 1)
        outcomes.append({n: p.detach() for n, p in model.hybrid_adapter.named_parameters()})
    for name, old in outcomes[0].items():
        new = outcomes[1][name][tuple(slice(n) for n in old.shape)]
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


def test_the_first_moment_rotates_like_a_gradient():
    """Momentum and a fresh gradient at the same point stay proportional through a rotation."""
    model = adapted(llama(), shared_parameters=False)
    optimizer = torch.optim.SGD(model.hybrid_adapter.parameters(), lr=0.0, momentum=0.5)
    batch = tokens(4)

    def step() -> None:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()

    step()
    bank = model.hybrid_adapter
    path = "model.layers.0.self_attn.q_proj"
    key = bank.sites[path].spec.own_key
    with torch.no_grad():  # rank 2 in truth, in four units: a cut to 2 loses nothing
        bank.lora_b[key][:, 2:] = bank.lora_b[key][:, :2] @ torch.randn(2, 2)
    optimizer.state.clear()
    step()
    scores = dict.fromkeys(bank.sites, 1.0) | {path: 0.0}
    report = set_dynamic_rank_allocation(
        model, scores, 2, 4, budget=cost(model) - 128, optimizer=optimizer, verbose=False
    )
    module = next(m for m in report.modules if m.path == path)
    assert module.after == 2 and module.error < 1e-5
    both = bank.lora_a[key], bank.lora_b[key]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in both]
    optimizer.zero_grad()
    model(batch, labels=batch).loss.backward()
    for parameter, momentum in zip(both, momenta, strict=True):
        torch.testing.assert_close(momentum, parameter.grad, rtol=1e-2, atol=1e-5)


def test_ties_and_runs_are_deterministic():
    reports = []
    for _ in range(2):
        torch.manual_seed(3)
        model = adapted(llama())
        scores = dict.fromkeys(model.hybrid_adapter.sites, 1.0)
        reports.append(set_dynamic_rank_allocation(
            model, scores, 1, 8, budget=cost(model) - 100, verbose=False))  # fmt: skip
    assert reports[0] == reports[1]


def test_both_ends():
    for least, most, end in ((8, 12, 0), (1, 2, 1)):
        model = adapted(llama())
        report = set_dynamic_rank_allocation(model, uneven(model), least, most, verbose=False)
        expected = {"lora": (least, most)[end], "bottleneck": (2 * least, 2 * most)[end]}
        assert all(m.after == expected[m.kind] for m in report.modules)
        assert "the bounds win" in report.note


def test_the_least_width_is_a_unit():
    """Of bottlenecks narrower than the ranks, of which the least is one."""
    model = adapted(llama(), lora_rank=8, adapter_size=2)
    report = set_dynamic_rank_allocation(model, uneven(model), 1, 12, verbose=False)
    assert min(m.after for m in report.modules if m.kind == "bottleneck") == 1


def test_one_module():
    model = adapted(llama(), target_modules=["model.layers.1.self_attn.q_proj"],
                    apply_lora_to=["model.layers.1.self_attn.q_proj"])  # fmt: skip
    (path,) = model.hybrid_adapter.sites
    report = set_dynamic_rank_allocation(model, {path: 0.3}, 2, 9, verbose=False)
    assert report.sizes == {path: 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=lambda s: s | {next(iter(s)): math.nan}), "got nan for model.layers.0"),
        (dict(scores=lambda s: s | {next(iter(s)): -1.0}), "got -1.0"),
        (dict(scores=lambda s: s | {next(iter(s)): math.inf}), "got inf"),
        (dict(scores=lambda s: s | {"lm_head": 1.0}), "one for lm_head, not adapted"),
        (dict(scores=lambda s: dict(list(s.items())[1:])), "none for model.layers.0"),
        (dict(scores=lambda s: dict.fromkeys(s, 0.0)), "0 for every module"),
        (dict(min_rank=0), "min_rank: got 0"),
        (dict(min_rank=True), "min_rank: got True"),
        (dict(min_rank=9, max_rank=8), "max_rank: got 8"),
        (dict(min_width=30, max_width=8), "max_width: got 8"),
        (dict(budget=10), "budget: got 10, allowed: an integer from"),
        (dict(budget=10**9), "budget: got 1000000000"),
        (dict(budget=1e5), "budget: got 100000.0"),
        (dict(within="layer"), "within: got 'layer', allowed: 'kind' or None"),
    ],
)
def test_refusals_change_nothing(change, message):
    model = adapted(llama())
    state, before = snapshot(model), sizes(model)
    scores = change.pop("scores", dict)(uneven(model))
    with pytest.raises(AdapterError, match=message):
        set_dynamic_rank_allocation(model, scores, **{"min_rank": 2, "max_rank": 12} | change)
    assert_same_state(model, state)
    assert sizes(model) == before


def test_within_kinds_each_kind_keeps_its_share_of_the_cost():
    """Scores of another magnitude in one kind move units between kinds, or do not."""
    model = adapted(llama())
    kinds = {path: site.spec.kind for path, site in model.hybrid_adapter.sites.items()}
    scores = {
        path: (9.0 if kind == "lora" else 1e-3) * (1 + index % 3)
        for index, (path, kind) in enumerate(kinds.items())
    }
    config = model.hybrid_adapter.config
    wide = dict(min_rank=1, max_rank=8 * config.lora_rank, min_width=1)
    usual = {kind: sum(unit for unit in _unit_costs(model, kind)) for kind in set(kinds.values())}
    report = set_dynamic_rank_allocation(model, scores, **wide, within="kind", verbose=False)
    for kind, size in (("lora", config.lora_rank), ("bottleneck", config.adapter_size)):
        spent = sum(module.cost for module in report.modules if module.kind == kind)
        assert spent == pytest.approx(usual[kind] * size, rel=0.1)
    assert {m.path: m.score for m in report.modules} == scores  # as given, not as scaled
    report = set_dynamic_rank_allocation(model, scores, **wide, verbose=False)
    widths = [m.after for m in report.modules if m.kind == "bottleneck"]
    assert max(widths) < config.adapter_size / 2


def test_within_kinds_a_kind_of_zeros_is_shared_out_evenly():
    model = adapted(llama())
    kinds = {path: site.spec.kind for path, site in model.hybrid_adapter.sites.items()}
    scores = {path: float(kind == "lora") for path, kind in kinds.items()}
    before = sizes(model)
    set_dynamic_rank_allocation(model, scores, within="kind", verbose=False)
    assert sizes(model) == before


def _unit_costs(model, kind: str) -> list[int]:
    specs = [site.spec for site in model.hybrid_adapter.sites.values()]
    return [
        s.in_features + s.out_features if kind == "lora" else 2 * s.out_features + 1
        for s in specs
        if s.kind == kind
    ]


def bitsandbytes(parameters, name: str, *states: str) -> torch.optim.Optimizer:
    """What bitsandbytes' optimizers keep in 32 bits, under the names that it gives them."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.optimizer_name = name
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {"step": 3} | {s: torch.rand_like(p) + 0.01 for s in states}
    return optimizer


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("name", "states", "squares"),
    [
        ("adam", ("state1", "state2"), ("state2",)),
        ("lion", ("state1",), ()),
        ("rmsprop", ("state1",), ("state1",)),
        ("adagrad", ("state1",), ("state1",)),
    ],
)
def test_squares_stay_squares_whatever_they_are_called(name, states, squares, wrapped):
    """A cut rotates, with entries of either sign; the rest changes like gradients."""
    model = adapted(llama(), shared_parameters=False)
    optimizer = bitsandbytes(model.hybrid_adapter.parameters(), name, *states)
    if wrapped:  # as training loops hold it
        optimizer = Accelerator().prepare_optimizer(optimizer, device_placement=False)
    set_dynamic_rank_allocation(model, uneven(model), optimizer=optimizer, **BOUNDS)
    lora = [*model.hybrid_adapter.lora_a.values(), *model.hybrid_adapter.lora_b.values()]
    for state in states:
        least = min(optimizer.state[p][state].min().item() for p in lora)
        assert least >= 0 if state in squares else least < 0, state


def test_squares_stay_above_the_square_of_the_mean():
    """Of gradients that were always the same, but for rounding: RMSprop takes their root."""
    model = adapted(llama(), shared_parameters=False)
    optimizer = torch.optim.RMSprop(model.hybrid_adapter.parameters(), centered=True)
    for p in model.hybrid_adapter.parameters():
        mean = torch.randn_like(p)
        optimizer.state[p] = {"square_avg": mean.square() * (1 - 1e-6), "grad_avg": mean}
    set_dynamic_rank_allocation(model, uneven(model), optimizer=optimizer, **BOUNDS)
    for name, p in model.hybrid_adapter.named_parameters():
        if name.startswith("bias_up."):  # of no units: as it was
            continue
        state = optimizer.state[p]
        assert torch.equal(state["square_avg"], state["grad_avg"].square()), name
        assert state["grad_avg"].shape == p.shape and state["grad_avg"].any()


def test_what_the_parameter_moved_by_rotates_like_the_parameter():
    """Steps of one row alone: their mean square after a rotation is that of the rotated steps."""
    model = adapted(llama(), shared_parameters=False)
    optimizer = torch.optim.Adadelta(model.hybrid_adapter.parameters())
    bank, path = model.hybrid_adapter, "model.layers.0.self_attn.q_proj"
    key = bank.sites[path].spec.own_key
    step = torch.zeros_like(bank.lora_a[key])
    step[1] = torch.randn(step.shape[1])
    for p in (bank.lora_a[key], bank.lora_b[key]):
        optimizer.state[p] = {"step": torch.tensor(1.0), "acc_delta": torch.zeros_like(p)}
    optimizer.state[bank.lora_a[key]]["acc_delta"] = step.square()
    old = bank.lora_a[key].detach().clone()
    scores = dict.fromkeys(bank.sites, 1.0) | {path: 0.0}
    set_dynamic_rank_allocation(
        model, scores, 2, 4, budget=cost(model) - 128, optimizer=optimizer, verbose=False
    )
    new = bank.lora_a[key].detach()
    assert new.shape[0] == 2
    rotation = torch.linalg.lstsq(old.double().T, new.double().T).solution.T  # new = rotation · old
    moved = rotation @ step.double()
    actual = optimizer.state[bank.lora_a[key]]["acc_delta"]
    torch.testing.assert_close(actual.double(), moved.square(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Rprop])
def test_an_optimizer_that_keeps_something_else_is_refused(kind):
    model = adapted(llama())
    optimizer = kind(model.hybrid_adapter.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    state, before = snapshot(model), sizes(model)
    with pytest.raises(
        AdapterError, match=f"{kind.__name__} keeps '(ax|step_size|prev)', of which"
    ):
        set_dynamic_rank_allocation(model, uneven(model), optimizer=optimizer, **BOUNDS)
    assert_same_state(model, state)
    assert sizes(model) == before


@pytest.mark.parametrize("kept", [{"blocks": 7}, {"mystery": None}])
def test_a_foreign_optimizer_state_changes_nothing(kept):
    model = adapted(llama())
    optimizer = torch.optim.SGD(model.hybrid_adapter.parameters(), lr=0.1)
    some = next(iter(model.hybrid_adapter.parameters()))
    ((name, size),) = kept.items()
    optimizer.state[some][name] = torch.zeros(some.shape if size is None else size)
    state, before = snapshot(model), sizes(model)
    with pytest.raises(AdapterError, match=f"optimizer: SGD keeps '{name}'"):
        set_dynamic_rank_allocation(model, uneven(model), optimizer=optimizer, **BOUNDS)
    assert_same_state(model, state)
    assert sizes(model) == before


def test_no_adapter_and_a_merged_one_are_refused():
    with pytest.raises(AdapterError, match="has no hybrid adapter"):
        set_dynamic_rank_allocation(llama(), {})
    model = adapted(llama())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        set_dynamic_rank_allocation(model, uneven(model))


def test_it_prints_what_it_did(capsys):
    model = adapted(llama())
    report = set_dynamic_rank_allocation(model, uneven(model), 2, 12)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    for module in report.modules:
        assert f"{module.path} " in printed
    assert f"{report.budget:,}" in printed


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    model = adapted(llama())
    report = set_dynamic_rank_allocation(model, uneven(model), **BOUNDS)
    report.plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("shared", [True, False])
def test_a_loss_that_is_kept_does_not_keep_the_old_sizes(shared):
    """A loop's `loss` holds its graph while the next one is built."""
    found = []
    for keep in (True, False):
        torch.manual_seed(0)
        model = adapted(llama(), shared_parameters=shared)
        batch = tokens(4)
        loss = model(batch, labels=batch).loss
        loss.backward()
        if not keep:
            del loss
        set_dynamic_rank_allocation(model, uneven(model), **BOUNDS)
        model(batch, labels=batch).loss.backward()
        found.append({name: p.grad for name, p in model.hybrid_adapter.named_parameters()})
    for name, grad in found[0].items():
        assert grad is not None and torch.equal(grad, found[1][name]), name


def test_a_kind_spends_its_part_where_bounds_bind():
    """The uniform configuration's cost of a kind, to within one unit of it."""
    model = adapted(llama(num_hidden_layers=4))
    kinds = {path: site.spec.kind for path, site in model.hybrid_adapter.sites.items()}
    lora = [path for path, kind in kinds.items() if kind == "lora"]
    scores = dict.fromkeys(kinds, 1.0) | {path: 3.0 ** (i % 7) for i, path in enumerate(lora)}
    config = model.hybrid_adapter.config
    usual = {
        "lora": config.lora_rank * sum(_unit_costs(model, "lora")),
        "bottleneck": config.adapter_size * sum(_unit_costs(model, "bottleneck")),
    }
    report = set_dynamic_rank_allocation(model, scores, **BOUNDS, within="kind")
    assert {2, 12} <= {m.after for m in report.modules if m.kind == "lora"}  # both bounds bind
    for kind, whole in usual.items():
        spent = sum(m.cost for m in report.modules if m.kind == kind)
        assert abs(spent - whole) < max(_unit_costs(model, kind))


def energy(product: torch.Tensor, rank: int = 0) -> torch.Tensor:
    """Of the singular values from `rank` on."""
    return torch.linalg.svdvals(product)[rank:].square().sum()


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_a_narrow_module_beside_a_cut_one(strength):
    """One of 4 units in a bank of 8 stays, the other is cut from 8 to 2: the stronger is served.

    Against what is best for the stronger alone, and then for the other.
    """
    torch.manual_seed(0)
    a, stays, cut = (torch.randn(n, m).double() for n, m in ((8, 64), (64, 4), (64, 8)))
    cut *= strength
    small, large = stays @ a[:4], cut @ a
    found = rotate(a, [stays, cut], [1.0, 1.0], [4, 2])
    lost = [e * e * energy(whole) for e, whole in zip(found.errors, (small, large), strict=True)]

    if strength < 1:  # all of the one that stays, and of that the best for the other
        kept = torch.linalg.svd(small).Vh[:4]
        by_hand = energy(large) - (energy(large @ kept.T) - energy(large @ kept.T, 2))
    else:
        kept = torch.linalg.svd(large).Vh[:2]
        by_hand = energy(large, 2) + energy(small - small @ kept.T @ kept, 2)
    assert energy(large, 2) <= sum(lost) <= 1.001 * by_hand

    for b, size, wrong in ((stays, 4, lost[0]), (cut, 2, lost[1])):  # the errors are true
        kept = b @ found.columns[:size, : b.shape[1]].T @ found.rows[:size] @ a
        error = (b @ a[: b.shape[1]] - kept).square().sum()
        torch.testing.assert_close(error, wrong, rtol=1e-6, atol=1e-9)


def test_rows_of_a_cut_bank_are_as_long_as_they_were():
    """With it go the size of A's gradients and the speed at which it learns."""
    torch.manual_seed(0)
    a, b = 5 * torch.randn(8, 64).double(), torch.randn(64, 8).double()
    length = a.square().sum(1).mean().sqrt()
    rows = rotate(a, [b], [1.0], [3]).rows @ a
    torch.testing.assert_close(rows.norm(dim=1), length.expand(3))
    found = rotate(torch.zeros(8, 64), [b], [1.0], [3])  # a bank of zeros has no length
    assert found.errors == [0.0] and found.columns.isfinite().all()
