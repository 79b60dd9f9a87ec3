"""Codes, steps and offsets of a weight in 4 bits: a search for the least error, without data.

Rounding to the nearest of 16 levels between a group's least and greatest weight spends them on the
extremes. Here several narrower ranges are tried, each followed by least squares (for given codes
the best step and offset have a closed form, for given step and offset the best code is the
nearest), and each group keeps what erred least. Alternating so is Lloyd's algorithm (IEEE
Transactions on Information Theory 28, 1982) with the levels held equidistant.
"""

import torch

_RANGES = (1.0, 0.9, 0.8, 0.7)  # of a group's own, about its middle
_ROUNDS = 2  # of least squares after each
CHUNK = 1 << 22  # weights at a time: bounds the scratch memory
LEVELS = 16


def fit(
    groups: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes uint8 [G, g] in 0..15 with bf16 steps and offsets [G]: `code·step + offset`.

    Args:
        groups: [G, g], finite.
        importance: [n, g] fp32 or None: what a squared error of each weight counts, in the first n
            groups (a row of the weight) and in every n after them.
    """
    rows = max(1, CHUNK // max(groups.shape[1], 1))
    parts = []
    for start in range(0, len(groups), rows):
        part = groups[start : start + rows].float()
        parts.append(_fit(part, _of_groups(importance, start, part)))
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def _of_groups(importance, start, part):
    """What errors count in the groups `part` from `start` on; all at once would be a second W."""
    if importance is None:
        return None
    return importance[torch.arange(start, start + len(part), device=part.device) % len(importance)]


def _fit(w, importance):
    best = least = None
    for found in _candidates(w, importance):
        codes, step, offset = found
        error = (codes * step + offset - w).square_()
        error = (error if importance is None else error * importance).sum(1, keepdim=True)
        if best is None:
            best, least = found, error
            continue
        better = error < least
        pairs = zip(found, best, strict=True)
        best = tuple(torch.where(better, new, old) for new, old in pairs)
        least = torch.where(better, error, least)
    codes, step, offset = best
    return codes.to(torch.uint8), step[:, 0].bfloat16(), offset[:, 0].bfloat16()


def _candidates(w, importance):
    """Codes [G, g], step and offset [G, 1] of every attempt, all in fp32."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    for fraction in _RANGES:
        step = (high - low) * (fraction / (LEVELS - 1))
        offset = (low + high) / 2 - step * ((LEVELS - 1) / 2)
        step, offset = _stored(step), _stored(offset)
        codes = _nearest(w, step, offset)
        yield codes, step, offset
        for _ in range(_ROUNDS):
            step, offset = _least_squares(codes, w, importance, step, offset)
            step, offset = _stored(step), _stored(offset)
            codes = _nearest(w, step, offset)
            yield codes, step, offset


def _stored(x: torch.Tensor) -> torch.Tensor:
    """As it will be read back: codes are chosen for the rounded step, which repairs most of it."""
    return x.bfloat16().float()


def _nearest(w, step, offset):
    return ((w - offset) / torch.where(step == 0, 1, step)).round_().clamp_(0, LEVELS - 1)


def _least_squares(codes, w, importance, step, offset):
    """The step and offset of least squared error for `codes`; the old ones where all are equal."""
    u = torch.ones_like(w) if importance is None else importance
    total = u.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean_code = (u * codes).sum(1, keepdim=True) / total
    mean_weight = (u * w).sum(1, keepdim=True) / total
    centred = u * (codes - mean_code)
    variance = (centred * codes).sum(1, keepdim=True)
    covariance = (centred * (w - mean_weight)).sum(1, keepdim=True)
    varies = variance > 1e-6 * total
    new = torch.where(varies, covariance / torch.where(varies, variance, 1), step)
    return new, torch.where(varies, mean_weight - new * mean_code, offset)


def pack(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """uint8 [out, in] codes -> uint8 [out, in / 2].

    Byte j of a group holds its code j in the low four bits and code j + g/2 in the high ones, so
    that unpacking yields two runs of neighbours.
    """
    out_features, in_features = codes.shape
    halves = codes.view(out_features, -1, 2, group_size // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(out_features, in_features // 2)


def unpack(data: torch.Tensor, group_size: int) -> torch.Tensor:
    """The reverse of `pack`."""
    pairs = data.view(data.shape[0], -1, 1, group_size // 2)
    return torch.cat((pairs & 15, pairs >> 4), 2).reshape(data.shape[0], -1)
