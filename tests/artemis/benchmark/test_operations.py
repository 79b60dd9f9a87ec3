"""The accuracy rule where numbers meet the ends of their dtype."""

import torch

from artemis.benchmark.operations import OPERATIONS, Sizes, Truth, operands

LORA, CPU = OPERATIONS[0], torch.device("cpu")


def test_a_sum_in_fp32_may_go_term_by_term_but_not_over_rounded_numbers():
    torch.manual_seed(0)
    tensors = operands(LORA, Sizes(16, 4096, 24, 4), torch.float32, CPU)
    truth = Truth(LORA, tensors, ())

    def product(x, w):
        """One accumulator, term after term."""
        acc = torch.zeros(len(x), len(w))
        for terms in zip(x.T, w.T, strict=True):
            acc.addr_(*terms)
        return acc

    def summed(given, rounded=lambda t: t):
        x, weight, lora_a = (rounded(given[name]) for name in ("x", "weight", "lora_a"))
        low_rank = product(x, lora_a) @ given["lora_b"].T
        return product(x, weight) + given["bias"] + given["scale"] * low_rank

    assert truth.judge(summed).passed
    tf32 = truth.judge(lambda given: summed(given, lambda t: (t.view(torch.int32) & -8192).view(
        torch.float32
    )))  # fmt: skip
    assert not tf32.passed and tf32.where.startswith("y")


def test_a_scales_gradient_beyond_fp16_is_judged():
    """Plain torch's is infinite there, which excuses nothing."""
    torch.manual_seed(0)
    tensors = operands(LORA, Sizes(512, 512, 512, 16), torch.float16, CPU)
    truth = Truth(LORA, tensors, ("scale",))
    assert truth.exact["scale"] > torch.finfo(torch.float16).max and truth.plain["scale"].isinf()

    def run(given, gradient=1.0):
        scale = given["scale"]
        louder = scale.detach() + gradient * (scale - scale.detach())
        return LORA.public(given | {"scale": louder}, impl="eager")

    assert truth.judge(run).passed
    assert truth.judge(lambda given: run(given, 1.02)).where.startswith("scale")
    assert not truth.judge(lambda given: run(given, 1.02)).passed
