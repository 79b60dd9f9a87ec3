"""Every path draws the mask that `dropout_mask` shows, forward and backward."""

import pytest
import torch

import artemis_kernels
from artemis_kernels.core import rng
from tests import kit
from tests.core import mask_oracle
from tests.kit import Sizes
from tests.ops.operations import ADAPTER, BOTTLENECK, HALF, LORA, OPERATIONS, SINGLE, every_path


def bare(operation, rows: int, columns: int, dtype: torch.dtype) -> kit.Tensors:
    """Operands that make the branch `mask / keep rate`: ones through identities."""
    eye, zeros = torch.eye(columns, dtype=dtype), torch.zeros(columns, columns, dtype=dtype)
    x = torch.ones(rows, columns, dtype=dtype)
    if operation is LORA:
        return {"x": x, "weight": zeros, "lora_a": eye, "lora_b": eye}
    if operation is ADAPTER:
        return {"x": x, "weight": eye, "down": eye, "up": eye}
    return {"x": x, "down": eye, "up": eye, "residual": torch.zeros_like(x)}


def branch_of(operation, run, tensors, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch's value and its gradient to x, for `bare` operands and dY of ones."""
    if operation is not LORA:
        options["activation"] = "identity"
    results = kit.outcome(run, tensors, ["x"], **options)
    through_base = 1 if operation is ADAPTER else 0
    return results["y"] - through_base, results["x"] - through_base


# Even columns share hashes between neighbours, odd ones do not; 70 units need two tiles.
@pytest.mark.parametrize("shape", [(37, 16), (37, 15), (5, 70), (65, 33)], ids=str)
@pytest.mark.parametrize(("operation", "path"), every_path(SINGLE, HALF))
def test_the_mask_used_is_the_mask_shown(operation, path, shape):
    if path.strategy == "one_pass":
        pytest.skip("one pass has no dropout, and is never chosen with it")
    p, seed = 0.375, -123456789  # 0.375: the keep rate's inverse is exact enough in fp16
    tensors = bare(operation, *shape, path.dtype)
    value, gradient = branch_of(operation, operation.along(path), tensors, dropout_p=p, seed=seed)
    mask = artemis_kernels.dropout_mask(shape, p, seed, "cpu")
    wanted = mask.to(path.dtype) / (1 - p)
    torch.testing.assert_close(value, wanted, rtol=2e-3, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("operation", "path"), every_path(SINGLE))
def test_kept_from_the_threshold_on(operation, path):
    """A lane equal to the threshold is kept, one below it dropped."""
    if path.strategy == "one_pass":
        pytest.skip("one pass has no dropout, and is never chosen with it")
    tensors = bare(operation, 3, 16, SINGLE)
    for index in (20, 21):  # either lane of a hash
        lane = mask_oracle.lane(index, 3)
        for threshold, keep in ((lane, True), (lane + 1, False)):
            value, _ = branch_of(
                operation, operation.along(path), tensors, dropout_p=threshold / 65536, seed=3
            )
            assert (value.reshape(-1)[index] != 0) == keep


@pytest.mark.parametrize("impl", ["eager", "triton", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_mask_of_leading_dimensions(operation, impl):
    """The mask is of [..., columns], row-major, whatever the leading dimensions."""
    tensors = bare(operation, 6, 9, SINGLE)
    for name in ("x", "residual"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(2, 3, 9)
    for seed in (5, torch.tensor([5])):
        value, _ = branch_of(
            operation, operation.public, tensors | scale_of(operation), dropout_p=0.5, seed=seed,
            impl=impl,
        )  # fmt: skip
        mask = artemis_kernels.dropout_mask((2, 3, 9), 0.5, seed, "cpu")
        assert torch.equal(value != 0, mask)


def scale_of(operation) -> kit.Tensors:
    return {"scale": torch.tensor(1.0)} if operation is LORA else {}


@pytest.mark.parametrize("impl", [None, "triton", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_no_seed_draws_one_from_torchs_generator(operation, impl):
    tensors = operation.operands(kit.SIZES, SINGLE)

    def run(seed):
        torch.manual_seed(seed)
        return operation.public(**tensors, dropout_p=0.5, impl=impl)

    kit.assert_same_bits(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    drawn = artemis_kernels.new_seed("cpu")
    kit.assert_same_bits(operation.public(**tensors, dropout_p=0.5, seed=drawn, impl=impl), run(1))


@pytest.mark.parametrize("p", [0, 0.0, 1e-6])  # 1e-6 rounds to no lane at all
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_no_dropout_costs_nothing(operation, p, monkeypatch):
    """No seed is drawn, no mask formed, no bit changed."""

    def refuse(*_, **__):
        raise AssertionError("a seed or a mask was drawn")

    for name in ("new_seed", "dropout_mask", "keep_scale"):
        monkeypatch.setattr(rng, name, refuse)
    tensors = operation.operands(kit.SIZES, SINGLE)
    plain = kit.outcome(operation.public, tensors, operation.trained)
    for seed in (None, 3):
        results = kit.outcome(operation.public, tensors, operation.trained, dropout_p=p, seed=seed)
        kit.assert_same_outcome(results, plain)


def test_expectation_is_unbiased():
    """Over many seeds the mean of the output is the output without dropout."""
    tensors = BOTTLENECK.operands(Sizes(4, 8, 0, 6), torch.float64)
    plain = artemis_kernels.bottleneck_adapter(**tensors)
    draws = torch.stack(
        [
            artemis_kernels.bottleneck_adapter(**tensors, dropout_p=0.3, seed=seed)
            for seed in range(2000)
        ]
    )
    standard_error = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - plain).abs() < 5 * standard_error + 1e-12).all()
