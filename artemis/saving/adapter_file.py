"""The adapter on disk: one safetensors file whose header says everything, and a readable copy.

    hybrid_adapter.safetensors      tensors, and in the header's metadata, under "hybrid_adapter",
                                    one JSON object: format, library version, configuration,
                                    adapted modules with their ranks, heads, the base's identity
                                    and, under "base_samples", some of the base's numbers
    hybrid_adapter_config.json      that JSON object without those numbers, for people

Only the first is read. No pickle.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed
from ..layers.bank import BANK, bank_shapes, site_tensors
from ..paths import is_within
from ..plan import KINDS, Plan, SiteSpec
from ..version import __version__
from .atomic import replace_files
from .header import Shapes, damage_named, read_header
from .identity import BaseIdentity

PARAMETERS_FILE = "hybrid_adapter.safetensors"
CONFIG_FILE = "hybrid_adapter_config.json"
FORMAT_VERSION = 1
_METADATA_KEY = "hybrid_adapter"
#: Not in the copy for people; older files lack it. In the same object, since the order in which
#: safetensors writes several is not always the same.
_SAMPLES_KEY = "base_samples"


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted module of a file: `shared` and `own` count the parameters it uses."""

    path: str
    kind: str
    size: int
    shared: int
    own: int


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds, without its tensors' values."""

    path: Path
    library_version: str
    config: HybridAdapterConfig
    plan: Plan
    base: BaseIdentity
    tensors: Shapes

    @property
    def parameters(self) -> int:
        """Number of stored values, a shared tensor's once."""
        return sum(prod(shape) for _, shape in self.tensors.values())

    def modules(self) -> list[ModuleSummary]:
        """Every adapted module, in the base's order."""
        rows = []
        for site in self.plan.sites:
            counts = {True: 0, False: 0}
            for key, shape in site_tensors(site, self.config).values():
                counts[key == site.shared_key and self.config.shared_parameters] += prod(shape)
            rows.append(ModuleSummary(site.path, site.kind, site.size, counts[True], counts[False]))
        return rows

    def load(self) -> dict[str, torch.Tensor]:
        """Read all tensors, on the CPU."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.tensors}


def write_adapter(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: HybridAdapterConfig,
    plan: Plan,
    base: BaseIdentity,
) -> None:
    """Write both files; whenever the process dies, the old adapter or the new one is complete."""
    header = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        # Which path computes is the machine's choice, not the adapter's.
        "config": {key: v for key, v in config.to_dict().items() if key != "impl"},
        "sites": [asdict(site) for site in plan.sites],
        "heads": list(plan.heads),
        "base": base.to_dict(),
    }
    copy = json.dumps(header, indent=2) + "\n"
    metadata = {_METADATA_KEY: json.dumps(header | {_SAMPLES_KEY: base.samples}, indent=2)}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_files(
        directory,
        {
            CONFIG_FILE: lambda path: path.write_text(copy, encoding="utf-8"),
            PARAMETERS_FILE: lambda path: save_file(contiguous, path, metadata),
        },
    )


def read_adapter(path: str | os.PathLike) -> AdapterFile:
    """Read and check what the adapter at `path` (its directory or its file) holds.

    Raises `FileNotFoundError` where there is none, `AdapterError` where the file is truncated,
    foreign, of a later format, or does not hold what its header says.
    """
    file_path = Path(path)
    if file_path.is_dir():
        file_path = file_path / PARAMETERS_FILE
    if not file_path.is_file():
        raise FileNotFoundError(f"no hybrid adapter at {path} (looked for {file_path})")
    header, tensors = read_header(file_path, _METADATA_KEY, FORMAT_VERSION, "a hybrid adapter's")
    adapter = _parse(file_path, header, tensors)
    _check_tensors(adapter)
    return adapter


def _parse(path: Path, header: dict[str, Any], tensors: Shapes) -> AdapterFile:
    with damage_named(path):
        samples = header.get(_SAMPLES_KEY, "")
        return AdapterFile(
            path=path,
            library_version=str(header["library_version"]),
            config=HybridAdapterConfig.from_dict(header["config"]),
            plan=Plan(
                tuple(SiteSpec(**_typed(SiteSpec, site)) for site in header["sites"]),
                tuple(_of_type(head, str) for head in header["heads"]),
            ),
            base=BaseIdentity(**_typed(BaseIdentity, header["base"] | {"samples": samples})),
            tensors=tensors,
        )


def _typed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Check that `values` holds the fields of `cls`, each of its declared type."""
    wanted = {entry.name: entry.type for entry in fields(cls)}
    if values.keys() != wanted.keys():
        raise ValueError(f"fields {listed(values)} instead of {listed(wanted)}")
    if "kind" in wanted and values["kind"] not in KINDS:
        raise ValueError(f"kind {values['kind']!r}")
    return {
        name: _of_type(value, wanted[name] if isinstance(wanted[name], type) else str)
        for name, value in values.items()
    }


def _of_type(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise ValueError(f"{value!r} instead of a {wanted.__name__}")
    return value


def _check_tensors(adapter: AdapterFile) -> None:
    """Refuse a file whose tensors are not those that its header describes."""
    expected = {
        f"{BANK}.{role}.{key}": shape
        for role, shapes in bank_shapes(adapter.plan.sites, adapter.config).items()
        for key, shape in shapes.items()
    }
    found = {
        name: shape
        for name, (_, shape) in adapter.tensors.items()
        if not is_within(name, adapter.plan.heads)
    }
    if found != expected:
        wrong = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise AdapterError(
            f"{adapter.path}: tensors differ from the file's own description: {listed(wrong)}"
        )
