"""Decoding token by token, for every arm at what is fastest: a static cache, plain attention.

A cache that grows is copied for each token. transformers' static one is not, and its position is a
tensor, so that a step can be replayed as a CUDA graph.
"""

import torch
from transformers import PreTrainedModel, StaticCache

from .arms import TrainingStep, base_of

NEW_TOKENS = 16  # decoded in one run of the workload


class Token:
    """A call decodes one token after the batch's prompts; `rewind` forgets those decoded."""

    def __init__(self, step: TrainingStep) -> None:
        self._model, prompts = step.model, step.batch
        self._cache = StaticCache(self._model.config, max_cache_len=prompts.shape[1] + NEW_TOKENS)
        self._token = prompts[:, -1:].clone()
        self._tokens_read = prompts.shape[1]
        with torch.inference_mode():
            self._forward(prompts)
        base = base_of(self._model)
        if is_slow_at_single_queries(base):
            base.set_attn_implementation("eager")

    def __call__(self) -> torch.Tensor:
        """The logits [batch, 1, vocabulary]; NEW_TOKENS calls may follow a `rewind`."""
        with torch.inference_mode():
            return self._forward(self._token)

    def rewind(self) -> None:
        with torch.inference_mode():
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(self._tokens_read)

    def run(self) -> None:
        """Decode NEW_TOKENS tokens after the prompts, each time the same."""
        self.rewind()
        for _ in range(NEW_TOKENS):
            self()

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits


def is_slow_at_single_queries(model: PreTrainedModel) -> bool:
    """Whether a model attends by torch's fused attention where that decodes slowly.

    Over bf16 on a CPU, keys of its own a head; query heads that share keys are multiplied together,
    and fast (docs/benchmarks.md, Attention).
    """
    config = model.config
    alone = config.num_key_value_heads == config.num_attention_heads
    by_torch = config._attn_implementation == "sdpa"
    return by_torch and alone and model.dtype == torch.bfloat16 and model.device.type == "cpu"
