"""`attn_implementation="artemis"`: `artemis_kernels.attention` under transformers' interface.

It means what "sdpa" means. What that operation does not take (dropout of attention weights, a bias
of positions, a soft cap, tensors on a GPU) goes to "sdpa", and so does everything under
torch.compile.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import artemis_kernels

NAME = "artemis"
_OF_SDPA = ("position_bias", "softcap", "cache")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, heads, queries, head_dim]
    key: torch.Tensor,  # [batch, key_value_heads, keys, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # as `sdpa_mask` makes it
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Return [batch, queries, heads, head_dim], and no weights."""
    if not _serves(query, attention_mask, dropout, kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    if torch.is_autocast_enabled("cpu"):  # it casts what torch's own products take
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and queries > 1
    if causal:  # a static cache that holds nothing yet is longer than the prompt
        key, value = key[:, :, :queries], value[:, :, :queries]
    y = artemis_kernels.attention(
        query, key, value, mask=attention_mask, scale=scaling, causal=causal
    )
    return y.transpose(1, 2).contiguous(), None


def _serves(query, mask, dropout: float, options: dict) -> bool:
    if torch.compiler.is_compiling() or query.device.type != "cpu" or dropout:
        return False
    if any(
        options.get(name, False) is not False and options[name] is not None for name in _OF_SDPA
    ):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
