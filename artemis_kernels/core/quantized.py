"""`QuantizedWeight`: a frozen weight in 8 or 4 bits, in the place of a tensor."""

from dataclasses import dataclass, replace

import torch

from . import four_bits, packed_passes
from .four_bits import CHUNK
from .packed_passes import FORMATS
from .products import accumulator
from .registration import define

GROUP_SIZES = (256, 128, 64, 32, 16, 8)
_DATA = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
_FORMAT_OF = {dtype: name for name, dtype in _DATA.items()}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_WIDE = 2048  # from this many input features on, groups of 128 do


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [out, in] in few bits, accepted wherever an operation takes `weight`.

    | format | data | scale | offset | weight |
    | --- | --- | --- | --- | --- |
    | `int8` | int8 [out, in] | fp32 [out] | None | `data · scale` |
    | `fp8` | float8_e4m3fn [out, in] | fp32 [out] | None | `data · scale` |
    | `int4` | uint8 [out, in / 2] | bf16 [out, in / g] | the same | `code · scale + offset` |

    Args:
        group_size: g, the weights along `in` that share an int4 scale and offset; else None.
        activation_bits: what x and dY are multiplied in. 16: their own dtype (weight-only).
            8: the weight's own format, int8 or e4m3, rounded per row. "auto": 8 where there are
            many rows and the device multiplies that format (a CPU: int8 only), else 16.
        makes_logits: whether x Wᵀ are the logits of a language model. Their gradient holds one
            number near −1 and thousands near 0 in each row, which int8 products then round with
            more care (docs/quantization.md); fp8 products do not, and on a GPU "auto" means 16
            for such a weight in fp8.

    Raises:
        ValueError, TypeError: parts that do not fit together.
    """

    data: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    format: str
    group_size: int | None
    activation_bits: int | str = "auto"
    makes_logits: bool = False

    def __post_init__(self):
        _check_options(self.format, self.group_size, self.activation_bits)
        _check(self.data, "data", _DATA[self.format], None)
        for part in (self.scale, self.offset):
            if isinstance(part, torch.Tensor) and part.device != self.data.device:
                raise ValueError(
                    f"QuantizedWeight: data is on {self.data.device}, but a part on {part.device}"
                )
        out_features, columns = self.data.shape
        if self.format != "int4":
            _check(self.scale, "scale", torch.float32, (out_features,))
            if self.offset is not None or self.group_size is not None:
                raise ValueError(f"QuantizedWeight: {self.format} has no offset and no group_size")
            return
        if self.group_size is None or 2 * columns % self.group_size:
            raise ValueError(
                f"QuantizedWeight: group_size {self.group_size} does not divide the"
                f" {2 * columns} input features"
            )
        groups = (out_features, 2 * columns // self.group_size)
        _check(self.scale, "scale", torch.bfloat16, groups)
        _check(self.offset, "offset", torch.bfloat16, groups)

    @classmethod
    @torch.no_grad()
    def quantize(
        cls,
        weight: torch.Tensor,
        format: str = "int8",
        *,
        group_size: int | None = None,
        activation_bits: int | str = "auto",
        importance: torch.Tensor | None = None,
        makes_logits: bool = False,
    ) -> "QuantizedWeight":
        """Round `weight` [out, in], any floating dtype and strides, to `format`.

        Args:
            group_size: of int4, one of 256, 128, ..., 8; None takes 128 from 2,048 input features
                on, else 64, or the largest smaller one that divides them.
            importance: of int4, [in] or None: how much an error in a column counts, such as the
                mean square of x there.

        Raises:
            ValueError, TypeError: a weight that is not a finite matrix, or does not fit the format.
        """
        _check_options(format, group_size, activation_bits)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise TypeError(f"QuantizedWeight: weight must be a floating-point tensor, got {kind}")
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(
                "QuantizedWeight: weight must be a matrix of at least one number,"
                f" got shape {tuple(weight.shape)}"
            )
        if not all(map(torch.isfinite, torch.aminmax(weight))):
            raise ValueError("QuantizedWeight: weight holds inf or nan")
        if format == "int4":
            size = _group_size(weight.shape[1], group_size)
            return cls(
                *_int4(weight, size, importance), format, size, activation_bits, makes_logits
            )
        if group_size is not None or importance is not None:
            raise ValueError(f"QuantizedWeight: {format} takes no group_size and no importance")
        return cls(*_per_row(weight, format), None, format, None, activation_bits, makes_logits)

    @classmethod
    def of_parts(
        cls,
        data: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        *,
        makes_logits: bool = False,
    ) -> "QuantizedWeight":
        """The weight that these tensors make up: their dtypes and shapes tell the format."""
        format = _FORMAT_OF.get(data.dtype, "int8")
        packed = format == "int4" and scale.dim() == 2 and scale.shape[1]
        group_size = 2 * data.shape[1] // scale.shape[1] if packed else None
        return cls(data, scale, offset, format, group_size, makes_logits=makes_logits)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        out_features, columns = self.data.shape
        return torch.Size((out_features, columns * 2 if self.format == "int4" else columns))

    @property
    def device(self) -> torch.device:
        return self.data.device

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """Rows of the weight, as `weight[start:stop]` of a tensor; no copy."""
        parts = (self.data, self.scale, self.offset)
        data, scale, offset = (None if part is None else part[start:stop] for part in parts)
        return replace(self, data=data, scale=scale, offset=offset)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.data, self.scale, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on `device`."""
        offset = None if self.offset is None else self.offset.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), offset=offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] that the numbers stand for, rounded once to `dtype`."""
        return _dequantize(self.data, self.scale, self.offset, dtype)


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`weight.dequantize(dtype)`, for callers inside an operator."""
    data, scale, offset = weight.data, weight.scale, weight.offset
    unpacked = packed_passes.unpacked(weight, dtype)
    if unpacked is not None:
        return unpacked
    wide = accumulator(dtype)
    if weight.format == "int4":
        codes = four_bits.unpack(data, weight.group_size).view(*scale.shape, weight.group_size)
        values = codes.to(wide) * scale.to(wide)[..., None] + offset.to(wide)[..., None]
        return values.view(weight.shape).to(dtype)
    return (data.to(wide) * scale.to(wide)[:, None]).to(dtype)


_dequantize = define(
    "dequantize(Tensor data, Tensor scale, Tensor? offset, ScalarType dtype) -> Tensor",
    lambda data, scale, offset, dtype: dequantized(
        QuantizedWeight.of_parts(data, scale, offset), dtype
    ),
    lambda data, scale, offset, dtype: data.new_empty(
        QuantizedWeight.of_parts(data, scale, offset).shape, dtype=dtype
    ),
)


def _per_row(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scale: the row's largest weight becomes the format's largest number."""
    data = torch.empty_like(weight, dtype=_DATA[format], memory_format=torch.contiguous_format)
    scale = weight.new_empty(weight.shape[0], dtype=torch.float32)
    rows = max(1, CHUNK // max(weight.shape[1], 1))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        data[part], scale[part] = _rounded(weight[part].float(), format)
    return data, scale


def _rounded(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = largest / _LARGEST[format]
    scale = torch.where(scale > 0, scale, 1.0)  # it may underflow where the largest does not
    levels = weight / scale[:, None]
    levels = levels.round_() if format == "int8" else levels
    limit = _LARGEST[format]
    return levels.clamp_(-limit, limit).to(_DATA[format]), scale


def _int4(weight: torch.Tensor, size: int, importance: torch.Tensor | None):
    """Data, scale and offset in groups of `size`."""
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    if importance is not None:
        if importance.shape != (in_features,) or not (importance >= 0).all():
            raise ValueError(
                f"QuantizedWeight: importance must be [{in_features}] numbers of at least 0,"
                f" got shape {tuple(importance.shape)}"
            )
        importance = importance.to(weight.device, torch.float32).reshape(-1, size)
    codes, scale, offset = four_bits.fit(weight.view(-1, size), importance)
    groups = (out_features, in_features // size)
    data = four_bits.pack(codes.view(out_features, in_features), size)
    return data, scale.view(groups), offset.view(groups)


def _group_size(in_features: int, asked: int | None) -> int:
    if asked is not None:
        if in_features % asked:
            raise ValueError(
                f"QuantizedWeight: group_size {asked} does not divide the {in_features} input"
                " features"
            )
        return asked
    return default_group_size(in_features)


def default_group_size(in_features: int) -> int:
    """The weights along `in` that share an int4 scale where nothing is asked for."""
    most = 128 if in_features >= _WIDE else 64
    for size in GROUP_SIZES:
        if size <= most and in_features % size == 0:
            return size
    raise ValueError(
        f"QuantizedWeight: int4 packs groups of 8 or more input features, and {in_features} is"
        " no multiple of 8; take int8"
    )


def _check_options(format: str, group_size: int | None, activation_bits: int | str) -> None:
    if format not in FORMATS:
        raise ValueError(f"QuantizedWeight: format must be one of {FORMATS}, got {format!r}")
    if group_size is not None and group_size not in GROUP_SIZES:
        raise ValueError(
            f"QuantizedWeight: group_size must be None or one of {GROUP_SIZES}, got {group_size!r}"
        )
    if activation_bits not in ("auto", 8, 16):
        raise ValueError(
            f"QuantizedWeight: activation_bits must be 'auto', 8 or 16, got {activation_bits!r}"
        )
    if activation_bits == 8 and format == "int4":
        raise ValueError(
            f"QuantizedWeight: activation_bits=8 needs format 'int8' or 'fp8', got {format!r};"
            " take 16"
        )


def _check(part: object, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    """Refuse a part that is no tensor of `dtype` and `shape`; None: that of any matrix."""
    if isinstance(part, torch.Tensor):
        if part.dtype == dtype and (part.dim() == 2 if shape is None else part.shape == shape):
            return
        got = f"{part.dtype} {tuple(part.shape)}"
    else:
        got = f"{part} ()"
    wanted = "any, any" if shape is None else ", ".join(map(str, shape))
    raise ValueError(f"QuantizedWeight: {name} must be {dtype} of shape ({wanted}), got {got}")
