"""What quantizing a model did: bytes, errors, and what was left as it was."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import log10, prod
from typing import Any

from ..text_table import aligned


@dataclass(frozen=True)
class LayerReport:
    """One packed layer; `relative_error` is rms(packed − weight) / rms(weight).

    Experts that are one parameter are one entry, under the parameter's path.
    """

    path: str
    out_features: int
    in_features: int
    format: str
    group_size: int | None
    bytes_before: int
    bytes_after: int
    relative_error: float
    #: How many matrices of these sizes; None: one, of a linear layer.
    experts: int | None = None

    @property
    def parameter(self) -> str:
        """Name of the parameter that was packed."""
        return self.path if self.experts else f"{self.path}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (experts, out, in)."""
        matrix = self.out_features, self.in_features
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def snr_db(self) -> float | None:
        """Signal to noise of the weight in dB; None where nothing was lost."""
        return -20 * log10(self.relative_error) if self.relative_error else None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_adapter_model` did; printed, a table.

    Attributes:
        layers: every packed layer, in the model's order.
        skipped: path of a linear layer, or of many matrices held as one, left as it was -> why.
        activation_bits: what the products' inputs are rounded to: "auto", 8 or 16.
        model_bytes_before, model_bytes_after: parameters and buffers of the whole model.
    """

    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    activation_bits: int | str
    model_bytes_before: int
    model_bytes_after: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the packed layers' weights, as they were held."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the packed layers' weights now, scales and offsets included."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def of_16_bits(self) -> float:
        """`bytes_after` over what the same weights take in 16 bits."""
        return self.bytes_after / sum(2 * prod(layer.shape) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = [asdict(layer) | {"snr_db": layer.snr_db} for layer in self.layers]
        totals = {
            name: getattr(self, name) for name in ("bytes_before", "bytes_after", "of_16_bits")
        }
        return asdict(self) | totals | {"layers": layers, "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantizationReport":
        """The reverse of `to_dict`."""
        names = [field.name for field in fields(LayerReport)]
        layers = tuple(
            LayerReport(**{name: layer[name] for name in names if name in layer})
            for layer in values["layers"]
        )
        rest = ("skipped", "activation_bits", "model_bytes_before", "model_bytes_after")
        return cls(layers, **{key: values[key] for key in rest})

    def __str__(self) -> str:
        rows = [("layer", "shape", "format", "MB before", "after", "error", "SNR dB")]
        for layer in self.layers:
            group = f" / {layer.group_size}" if layer.group_size else ""
            rows.append((
                layer.path, "x".join(map(str, layer.shape)), layer.format + group,
                _megabytes(layer.bytes_before), _megabytes(layer.bytes_after),
                f"{layer.relative_error:.2%}",
                "exact" if layer.snr_db is None else f"{layer.snr_db:.1f}",
            ))  # fmt: skip
        lines = aligned(rows, left=3)
        lines += [f"{path}  as it was: {reason}" for path, reason in self.skipped.items()]
        lines.append(
            f"{len(self.layers)} layers: {_megabytes(self.bytes_before)} MB, now"
            f" {_megabytes(self.bytes_after)} MB ({self.of_16_bits:.3f} of 16 bits); whole model:"
            f" {_megabytes(self.model_bytes_before)} MB, now"
            f" {_megabytes(self.model_bytes_after)} MB"
        )
        return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f}"
