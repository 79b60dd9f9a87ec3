"""The floor: a linear head on the features of the base as it is, fitted to the end.

Every trained arm starts from this head (Kumar et al., https://arxiv.org/abs/2202.10054), so that it
starts where the frozen arm ends.
"""

import torch
from torch import nn
from torch.nn import functional as F

#: Penalties to choose from: half their product with the head's squared norm is added to the loss.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_STEPS = 100


@torch.enable_grad()
def fit(features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> nn.Linear:
    """Multinomial logistic regression of labels [n] on features fp32 [n, size] by L-BFGS.

    The penalty is on the weights of standardized features; the head that is returned takes them as
    they are.
    """
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe", history_size=20
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels)
        value = value + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / deviation)
        head.bias.copy_(bias - (weight / deviation) @ mean)
    return head
