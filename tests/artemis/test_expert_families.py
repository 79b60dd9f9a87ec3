"""Every class of experts that the installed transformers marks, not only those known by name.

Each is built from one made-up configuration, packed, and compared with its own code in fp64.
"""

import copy
import importlib
import re
from pathlib import Path

import torch
import transformers

from artemis.experts import is_experts
from tests.artemis import moe
from tests.artemis.experts import packed, routed, run
from tests.artemis.quantization.kit import relative

MARKED = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)


class Sizes:
    """A configuration that answers to any name, by what the name is about."""

    _experts_implementation = "eager"
    moe_latent_size = None
    mlp_hidden_act = "relu2"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        kinds = {"_act": "silu", "eps": 1e-6, "expert": 4, "intermediate": 24, "hidden_size": 32}
        return next((value for kind, value in kinds.items() if kind in name), 1.5)


def marked_classes() -> list[type]:
    models, found = Path(transformers.__file__).parent / "models", []
    for path in sorted(models.glob("*/modeling_*.py")):
        if names := MARKED.findall(path.read_text()):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found += [getattr(module, name) for name in names]
    return found


def test_all_of_them_compute_as_over_the_dequantized_weights():
    classes, wrong = marked_classes(), {}
    for cls in classes:
        torch.manual_seed(0)
        plain = cls(Sizes())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.normal_(std=0.2)
        if not is_experts(plain):
            wrong[cls.__name__] = "of no known form"
            continue
        module, inputs = packed(copy.deepcopy(plain)), routed(9)
        results = run(module, *inputs), run(moe.fp64(module, plain), *inputs, dtype=torch.float64)
        errors = [relative(got, truth) for got, truth in zip(*results, strict=True)]
        if not max(errors) < 1e-5:
            wrong[cls.__name__] = errors
    assert len(classes) > 20 and not wrong
