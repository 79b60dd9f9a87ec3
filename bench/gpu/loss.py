"""A language model's loss and the gradient of its logits, beside torch on a copy in fp32."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

import artemis_kernels
from artemis.benchmark.timer import Timer

from .failures import FAILURES, failure

_JUDGED_ROWS = 256  # in fp64
_RELATIVE = 4e-6  # of fp32's sums and exponentials, as in tests/ops/test_cross_entropy.py


def losses(device: torch.device, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every vocabulary and provider, forward and backward together."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    for rows, classes in ((6, 50),) if tiny else ((8192, 32000), (8192, 128256)):
        torch.manual_seed(0)
        logits = (3 * torch.randn(rows, classes, device=device)).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,), device=device)
        about = {"kind": "loss", "rows": rows, "classes": classes}
        calls = {
            "torch": lambda x=logits, t=target: torch.autograd.grad(_plain(x, t), x),
            "artemis": lambda x=logits, t=target: torch.autograd.grad(_ours(x, t), x),
        }
        try:
            verdict = _judged(logits.detach()[:_JUDGED_ROWS], target[:_JUDGED_ROWS])
            calls["artemis"]()  # of all rows
        except FAILURES as error:
            verdict = failure(error)
        if not verdict["passed"]:
            del calls["artemis"]
            yield {**about, "provider": "artemis", **verdict}
        times = timer.rows(calls)
        for name, row in times.items():
            ratio = times["torch"]["ms"]["p50"] / row["ms"]["p50"]
            more = verdict if name == "artemis" else {}
            yield {**about, "provider": name, "over_torch": ratio, **more, **row}


def _ours(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return artemis_kernels.cross_entropy(x, target, impl="triton")


def _plain(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(x.float(), target)


def _judged(logits: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
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
