"""The steps that fused paths are made of: launchers with their tiles looked up for the chip."""

from typing import NamedTuple

import torch
from torch.nn import functional

from ...core import tuning
from ...core.device import Chip
from ...core.tiling import MATVEC_ROWS, Shape
from ..few_rows.shrink import shrink_rows
from .arguments import NO_DROPOUT, UNSCALED, Dropout, Scale
from .expand import expand, update
from .expand_backward import expand_backward
from .expand_persistent import expand_persistent, has_descriptors
from .shrink import shrink
from .shrink_backward import shrink_backward
from .sum_parts import sum_parts


class Hidden(NamedTuple):
    """What happens between the two products, as the launchers take it."""

    activation: str = "identity"
    dropout: Dropout = NO_DROPOUT

    def at(self, stage: str) -> dict:
        """The arguments of a launcher in a stage."""
        return {"stage": stage, "activation": self.activation, "dropout": self.dropout}


class ExpandGradients(NamedTuple):
    """Backward of `s·(S Bᵀ)`: what was asked for, else None."""

    hidden: torch.Tensor | None  # [M, R] fp32: dS or dz, without the scale
    b: torch.Tensor | None  # [N, R], b's dtype, scaled
    dot: torch.Tensor | None  # 0-d fp32: Σ (dYᵀ S) ⊙ B, the low-rank part of ds
    columns: torch.Tensor | None  # [N] fp32: Σ_m dY


def shrunk(
    x: torch.Tensor,
    f: torch.Tensor,
    chip: Chip,
    *,
    stage: str = "linear",
    dropout: Dropout = NO_DROPOUT,
    **hidden,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`shrink` of x [M, K] by f [R, K]; of few rows by the kernel without a dot."""
    (M, K), R, drops = x.shape, f.shape[0], dropout.p > 0
    shape = Shape(M, 0, K, R, x.dtype, drops and stage == "linear")
    if M <= MATVEC_ROWS and not drops and stage != "backward" and f.stride(1) == 1:
        hidden.pop("widths", None)  # they are those of masks
        config = tuning.config("matvec_shrink", shape, chip)
        return shrink_rows(x, f, config=config, stage=stage, **hidden)
    config = tuning.config("shrink", shape, chip)
    return shrink(x, f, config=config, stage=stage, dropout=dropout, **hidden)


def expanded(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    chip: Chip,
    *,
    vendor: bool,
    bias: torch.Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    **low_rank,
) -> torch.Tensor:
    """`x Wᵀ + bias + s·(mask·(S Bᵀ) + bias_low)`: one kernel, or the vendor's and an update."""
    shape = Shape(x.shape[0], weight.shape[0], x.shape[1], s.shape[1], x.dtype, dropout.p > 0)
    if vendor or tuning.draws_apart(shape, chip):
        y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return updated(y, s, b, chip, dtype=y.dtype, out=y, dropout=dropout, **low_rank)
    low_rank |= {"config": tuning.config("expand", shape, chip), "bias": bias, "dropout": dropout}
    if tuning.multiplies_by_descriptors(shape, chip) and has_descriptors(x, weight):
        return expand_persistent(x, weight, s, b, programs=chip.processors, **low_rank)
    return expand(x, weight, s, b, **low_rank)


def updated(
    residual: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    chip: Chip,
    *,
    dtype: torch.dtype,
    dropout: Dropout = NO_DROPOUT,
    **low_rank,
) -> torch.Tensor:
    """`residual + s·(mask·(S Bᵀ) + bias_low)` in `dtype`; no residual means 0."""
    shape = Shape(s.shape[0], b.shape[0], 0, s.shape[1], dtype, dropout.p > 0)
    config = tuning.config("update", shape, chip)
    return update(residual, s, b, config=config, dtype=dtype, dropout=dropout, **low_rank)


def sum_over_rows(
    x: torch.Tensor,
    s: torch.Tensor,
    out: torch.Tensor,
    chip: Chip,
    *,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
    other: torch.Tensor | None = None,
    with_columns: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write `s·Sᵀ dropout(x)` into out [R, K]; return its unscaled dot with `other`, and Σ_m x."""
    shape = Shape(x.shape[0], 0, x.shape[1], s.shape[1], x.dtype, dropout.p > 0)
    config = tuning.config("shrink_backward", shape, chip)
    parts, columns = shrink_backward(
        x, s, config=config, dropout=dropout, with_columns=with_columns
    )
    dot = sum_parts(parts, out, scale=scale, other=other)
    return dot, None if columns is None else columns.sum(0)


def expand_gradients(
    dy: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    chip: Chip,
    *,
    hidden: Hidden | None,
    scale: Scale,
    wants_hidden: bool,
    wants_b: bool,
    wants_dot: bool,
    wants_columns: bool,
    into: tuple[torch.Tensor, Scale] | None = None,
    one_read: bool | None = None,
) -> ExpandGradients:
    """Back through the expand and its hidden stage (None: linear, z is S).

    The hidden gradient goes into a matrix [M, R] by a scale, where both are given. `one_read`:
    whether both gradients come from one read of dY; None is what moves fewer bytes.
    """
    stage = {} if hidden is None else hidden.at("backward")
    if into is not None:
        stage["out"], stage["scale"] = into
    wants_product = wants_b or wants_dot
    shape = Shape(dy.shape[0], b.shape[0], 0, b.shape[1], dy.dtype)
    one_read = tuning.one_read(shape, chip) if one_read is None else one_read
    if wants_hidden and wants_product and one_read:
        config = tuning.config("expand_backward", shape, chip)
        out, parts, columns = expand_backward(
            dy, b, z, config=config, with_columns=wants_columns, **stage
        )
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        dot = sum_parts(parts, db, scale=scale, other=b if wants_dot else None)
        return ExpandGradients(out, db, dot, columns.sum(0) if wants_columns else None)
    out, h = None, z
    if wants_hidden or (wants_product and hidden is not None):
        with_h = wants_product and hidden is not None
        out, drawn = shrunk(dy, b.t(), chip, z=z, with_h=with_h, **stage)
        h = drawn if with_h else z
    if wants_product:
        return product_gradients(dy, h, b, chip, scale, wants_dot, wants_columns)._replace(
            hidden=out
        )
    columns = dy.sum(0, dtype=torch.float32) if wants_columns else None
    return ExpandGradients(out, None, None, columns)


def product_gradients(
    dy: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    chip: Chip,
    scale: Scale,
    wants_dot: bool,
    wants_columns: bool,
) -> ExpandGradients:
    """The part of `expand_gradients` that sums over rows, for an h [M, R] that exists."""
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    dot, columns = sum_over_rows(
        dy, h, db.t(), chip,
        scale=scale, other=b.t() if wants_dot else None, with_columns=wants_columns,
    )  # fmt: skip
    return ExpandGradients(None, db, dot, columns)


class SmallGradients(NamedTuple):
    """Gradients of a bottleneck's scale (0-d), and in fp32 of bias_down [R] and bias_up [N]."""

    scale: torch.Tensor | None
    bias_down: torch.Tensor | None
    bias_up: torch.Tensor | None


def small_gradients(
    gradients: ExpandGradients,
    scale: Scale,
    bias_up: torch.Tensor | None,
    wants_scale: bool,
    wants_bias_down: bool,
    wants_bias_up: bool,
) -> SmallGradients:
    """`ds = Σ (dYᵀ h) ⊙ U + Σ dY·b_u`, `db_d = s·Σ dz`, `db_u = s·Σ dY`."""
    dscale = dbias_down = dbias_up = None
    if wants_scale:
        dscale = gradients.dot
        if bias_up is not None:
            dscale = dscale + (gradients.columns * bias_up).sum()
        dscale = scale.gradient(dscale)
    if wants_bias_down:
        dbias_down = scale.of(gradients.hidden.sum(0))
    if wants_bias_up:
        dbias_up = scale.of(gradients.columns)
    return SmallGradients(dscale, dbias_down, dbias_up)


def like(x: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """`x` in the parameter's dtype; None stays None."""
    return None if x is None else x.to(parameter.dtype)
