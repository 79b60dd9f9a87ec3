"""What is trained in a training-step benchmark: model sizes, random weights, random tokens."""

from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel

from artemis.benchmark.models import HEAD_SIZE, SMALL, WIDE, Architecture, build, random_tokens


@dataclass(frozen=True)
class Case:
    """Sizes of a Llama and of its batch: `batch` sequences of `sequence` tokens a step."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 4096
    batch: int = 8
    sequence: int = 128

    @property
    def name(self) -> str:
        return f"{self.hidden}x{self.layers}"

    @property
    def tokens(self) -> int:
        """Tokens a training step sees."""
        return self.batch * self.sequence

    def resized(self, hidden: int | None, layers: int | None, tokens: int | None) -> "Case":
        """The case with some sizes replaced; tokens change the number of sequences.

        Raises ValueError where tokens do not fill whole sequences or hidden whole heads.
        """
        case = self
        if hidden is not None:
            if hidden < HEAD_SIZE or hidden % HEAD_SIZE:
                raise ValueError(f"hidden: got {hidden}, allowed: multiples of {HEAD_SIZE}")
            case = replace(case, hidden=hidden, intermediate=-(-hidden * 8 // 3 // 32) * 32)
        if layers is not None:
            if layers < 1:
                raise ValueError(f"layers: got {layers}, allowed: an integer from 1")
            case = replace(case, layers=layers)
        if tokens is not None:
            if tokens < self.sequence or tokens % self.sequence:
                raise ValueError(f"tokens: got {tokens}, allowed: multiples of {self.sequence}")
            case = replace(case, batch=tokens // self.sequence)
        return case

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


PRESETS = {
    name: Case(sizes.hidden, sizes.intermediate, sizes.layers)
    for name, sizes in (SMALL | WIDE).items()
}


def llama(case: Case, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of random weights in `dtype`, the same at each call, in training mode."""
    sizes = Architecture(case.hidden, case.intermediate, case.layers, case.vocabulary)
    return build(sizes, dtype, case.sequence)


def tokens(case: Case) -> torch.Tensor:
    """Random tokens [batch, sequence], int64, the same at each call."""
    return random_tokens(case.vocabulary, case.batch, case.sequence)
