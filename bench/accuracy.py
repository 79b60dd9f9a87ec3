"""The gate of `artemis.benchmark.accuracy` for the arms of `bench.train_step`."""

from artemis.benchmark import accuracy
from artemis.benchmark.accuracy import Verdict, adapter_parameters, compare, fill_zeros
from artemis.benchmark.arms import TrainingStep

from .cases import Case
from .providers import PRECISIONS, Arm, artemis_lora

__all__ = ["Verdict", "adapter_parameters", "check", "compare", "fill_zeros"]


def check(step: TrainingStep, arm: Arm, case: Case) -> Verdict:
    """Compare the arm's gradients with the references'; leaves its B and up filled, not zero."""
    dtype, is_peft = PRECISIONS[arm.precision], arm.name.startswith("peft")

    def reference() -> TrainingStep:
        if is_peft:
            return artemis_lora(case, dtype, 0.0, impl="reference", adapter_dtype="model")
        return arm.make(case, impl="reference")

    return accuracy.check(step, reference, dtype, masks=not is_peft)
