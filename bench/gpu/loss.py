"""A language model's loss and the gradient of its logits, beside torch on a copy in fp32."""

from collections.abc import Iterator

import torch
from torch.nn import functional

import artemis_kernels
from artemis.benchmark.timer import Timer

from .failures import FAILURES, Row, contained, failure, tried

_JUDGED_ROWS = 256  # in fp64
_RELATIVE = 4e-6  # of fp32's sums and exponentials, as in tests/ops/test_cross_entropy.py


def losses(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every vocabulary and provider, forward and backward together."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    for rows, classes in ((6, 50),) if tiny else ((8192, 32000), (8192, 128256)):
        about = {"kind": "loss", "rows": rows, "classes": classes}
        measured = _measured(rows, classes, dtype, device, timer)
        yield from contained((about | row for row in measured), about)


def _measured(
    count: int, classes: int, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Row]:
    """A row for either provider; `over_torch` is torch's time over its own."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(count, classes, device=device)).to(dtype).requires_grad_()
    target = torch.randint(classes, (count,), device=device)
    rows: dict[str, Row] = {"torch": {}, "artemis": {}}
    calls = {
        "torch": lambda: torch.autograd.grad(_plain(logits, target), logits),
        "artemis": lambda: torch.autograd.grad(_ours(logits, target), logits),
    }
    try:
        rows["artemis"] = _judged(logits.detach()[:_JUDGED_ROWS], target[:_JUDGED_ROWS])
    except FAILURES as error:
        rows["artemis"] = failure(error)
    if not rows["artemis"]["passed"]:
        del calls["artemis"]
    for name, times in timer.rows(tried(calls, rows)).items():
        rows[name] |= times
    for name, row in rows.items():
        if "ms" in row and "ms" in rows["torch"]:
            row["over_torch"] = rows["torch"]["ms"]["p50"] / row["ms"]["p50"]
        yield {"provider": name} | row


def _ours(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return artemis_kernels.cross_entropy(x, target, impl="triton")


def _plain(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(x.float(), target)


def _judged(logits: torch.Tensor, target: torch.Tensor) -> Row:
    """The largest error over its limit, of the loss and of its gradient, against fp64."""
    found = {}
    for name, run, x in (
        ("ours", _ours, logits),
        ("truth", functional.cross_entropy, logits.double()),
    ):
        x = x.requires_grad_()
        loss = run(x, target)
        found[name] = loss.detach().double(), torch.autograd.grad(loss, x)[0].double()
    (loss, gradient), (true_loss, true) = found["ours"], found["truth"]
    rounding = torch.finfo(logits.dtype).eps / 2 * true.abs()
    limits = rounding + _RELATIVE / len(target)
    errors = (
        ((gradient - true).abs() / limits).max().item(),
        ((loss - true_loss).abs() / (_RELATIVE * true_loss)).item(),
    )
    return {"error": max(errors), "passed": all(error <= 1 for error in errors)}
