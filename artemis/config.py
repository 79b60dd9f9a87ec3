"""`HybridAdapterConfig`: what the hybrid adapter is, from keyword arguments or YAML."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import Any, ClassVar

from .errors import AdapterError, listed
from .paths import leaf_of
from .schema import (
    check_fields,
    choice,
    flag,
    from_mapping,
    integer,
    is_integer,
    number,
    rule,
)
from .yaml_file import read_yaml

SECTION = "hybrid_adapter"
DEFAULT_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
DEFAULT_LORA = ("q_proj", "k_proj", "v_proj", "o_proj")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")
IMPLEMENTATIONS = ("triton", "eager", "reference")
#: A `lora_rank` still to be chosen from the data.
AUTO = "auto"

Names = tuple[str, ...] | str


def _is_list_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(check, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_names(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else _is_list_of(_is_name, value)


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return value != ""


def _factor(default: float) -> Any:
    return number(lambda value: value > 0, "a number above 0", default)


def _probability(default: float) -> Any:
    return number(lambda value: 0 <= value < 1, "a number in [0, 1)", default)


_NAMES = "a list of module names or one regular expression for whole paths"


@dataclass
class HybridAdapterConfig:
    """LoRA on some modules, bottlenecks on the others; every field has a default.

    A name in a list matches a module whose path is that name or ends in it; a string is a regular
    expression that must match the whole path. Raises `AdapterError` naming the field, what was
    given and what is allowed.
    """

    SECTION: ClassVar[str] = SECTION

    enabled: bool = flag(True)
    #: rows of LoRA's A; "auto": to be chosen from the task's data (`choose_ranks`)
    lora_rank: int | str = rule(
        lambda value: value == AUTO or (is_integer(value) and value >= 1),
        f"an integer from 1, or {AUTO}",
        default=8,
    )
    #: units of a bottleneck
    adapter_size: int = integer(1, default=64)
    #: dropout on a bottleneck's units
    adapter_dropout: float = _probability(0.1)
    #: one A, down and up for all layers that agree in target name and shape
    shared_parameters: bool = flag(True)
    #: the modules to adapt: linear layers, or blocks
    target_modules: Names = rule(
        lambda value: _is_names(value) and len(value) > 0, _NAMES, default=DEFAULT_TARGETS
    )
    #: targets that get LoRA (the others get a bottleneck); None: what the default names of them
    apply_lora_to: Names | None = rule(
        lambda value: value is None or _is_names(value), _NAMES, default=None
    )
    #: LoRA's factor itself, not alpha / rank
    scaling_factor: float = _factor(0.5)
    #: dropout on LoRA's input
    lora_dropout: float = _probability(0.0)
    #: of the bottlenecks
    activation: str = choice(*ACTIVATIONS, default="gelu")
    #: a bottleneck's factor
    adapter_scale: float = _factor(1.0)
    #: biases in the bottlenecks, own to each layer
    adapter_bias: bool = flag(True)
    #: start of A and down; B, up and biases start at zero
    init: str = choice("default", "gaussian", "orthogonal", "svd", default="default")
    #: weight and form of the penalty on LoRA's directions (`orthogonality_penalty`)
    orthogonality_weight: float = number(lambda value: value >= 0, "a number from 0", 0.0)
    orthogonality_form: str = choice("cosine", "frobenius", default="cosine")
    #: modules that stay as they are although they match
    exclude_modules: Names = rule(_is_names, _NAMES, default=())
    #: numbers of the layers to adapt; None: all
    layers: tuple[int, ...] | None = rule(
        lambda value: (
            value is None
            or (_is_list_of(lambda n: is_integer(n) and n >= 0, value) and len(value) > 0)
        ),
        "a list of layer numbers from 0, or null",
        default=None,
    )
    #: dtype of new parameters: float32, or that of the model's weights
    adapter_dtype: str = choice("float32", "model", default="float32")
    #: whether modules that read the same tensor share one dropout mask
    dropout_mask_sharing: str = choice("input", "module", default="input")
    #: whether modules that read the same tensor are computed in one operation
    grouping: bool = flag(True)
    #: whether what an unchanging adapter comes down to is kept between calls at inference
    cache_constants: bool = flag(True)
    #: heads to train and save as they are; None: those of a classification model
    modules_to_save: tuple[str, ...] | None = rule(
        lambda value: value is None or _is_list_of(_is_name, value),
        "a list of module names, or null",
        default=None,
    )
    #: whether the base's own norms, gated MLPs and rotary embeddings are fused (`fuse_model`)
    fuse_model: bool = flag(False)
    #: path of the operations; None: the best that applies
    impl: str | None = choice(None, *IMPLEMENTATIONS, default=None)

    def __post_init__(self) -> None:
        self.validate()
        if self.apply_lora_to is None:
            self.apply_lora_to = self._default_lora()

    def validate(self) -> None:
        """Check every field and how they fit together; lists become tuples."""
        check_fields(self)
        for entry in fields(self):
            if isinstance(value := getattr(self, entry.name), list):
                setattr(self, entry.name, tuple(value))
        self._check_lora_within_targets()
        if self.orthogonality_weight > 0 and self.apply_lora_to == ():
            raise AdapterError(
                f"{SECTION}.orthogonality_weight: got {self.orthogonality_weight}, allowed: 0 where"
                " apply_lora_to is empty (the penalty is on LoRA's matrices)"
            )

    def _check_lora_within_targets(self) -> None:
        if isinstance(self.target_modules, str) or not isinstance(self.apply_lora_to, tuple):
            return
        outside = [name for name in self.apply_lora_to if name not in self.target_modules]
        if outside:
            raise AdapterError(
                f"{SECTION}.apply_lora_to: got {listed(map(repr, outside))}, allowed: names in"
                f" target_modules ({listed(self.target_modules)})"
            )

    def _default_lora(self) -> tuple[str, ...]:
        if isinstance(self.target_modules, str):
            return DEFAULT_LORA
        names = tuple(n for n in self.target_modules if leaf_of(n) in DEFAULT_LORA)
        if not names:
            raise AdapterError(
                f"{SECTION}.apply_lora_to: not given, and the default ({listed(DEFAULT_LORA)})"
                f" names none of target_modules ({listed(self.target_modules)}); say which get LoRA"
                " ([] for bottlenecks only)"
            )
        return names

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HybridAdapterConfig":
        """Build from a mapping such as YAML gives; `"1e-4"` is a number where one is wanted."""
        return from_mapping(cls, values)

    @classmethod
    def from_yaml(cls, path: str | PathLike) -> "HybridAdapterConfig":
        """Read the `hybrid_adapter:` section of a YAML file; other sections do not count."""
        content = read_yaml(path)
        if not isinstance(content, dict) or SECTION not in content:
            found = listed(content) if isinstance(content, dict) else type(content).__name__
            raise AdapterError(f"{path}: got {found}, allowed: a file with a `{SECTION}:` section")
        return cls.from_dict(content[SECTION])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and YAML can hold; `from_dict` reads them back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
