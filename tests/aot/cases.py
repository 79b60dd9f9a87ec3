"""The launches whose artefacts are kept under budget: every kernel, at shapes of a language model.

bf16 activations with fp32 adapters (the default of training), one case a kernel in fp32, one with
an odd reduction. Each case is `launch(chip)`, on meta tensors, with the configuration that the
chip would get.
"""

from tests.aot import few_rows_cases, loss_cases, low_rank_cases, model_cases, packed_cases

CASES = (
    *low_rank_cases.CASES, *few_rows_cases.CASES, *packed_cases.CASES, *loss_cases.CASES,
    *model_cases.CASES,
)  # fmt: skip
