"""The eager path's activations against autograd."""

import math

import pytest
import torch

from artemis_kernels.core.activations import ACTIVATIONS
from artemis_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS as MEANING
from tests import kit


def test_same_names_as_the_reference():
    assert set(ACTIVATIONS) == set(MEANING) == set(kit.ACTIVATIONS)


@pytest.mark.parametrize("name", kit.ACTIVATIONS)
def test_value_and_slope(name):
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, math.inf, -math.inf])
    z = torch.cat((torch.linspace(-8, 8, 401), special)).double().requires_grad_()
    dh = torch.randn(z.shape, dtype=z.dtype)
    wanted = MEANING[name](z)
    (slope,) = torch.autograd.grad(wanted, z, dh)
    kit.assert_same_bits(ACTIVATIONS[name].forward(z.detach()), wanted.detach())
    kit.assert_same_bits(ACTIVATIONS[name].backward(dh, z.detach()), slope)
