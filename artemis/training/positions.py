"""The longest sequence that a model with learned positions takes."""

from torch import nn
from transformers import PreTrainedModel

#: Rows that OPT, BART and their like hold beside those of positions.
_SPARE = 2


def learned_positions(model: PreTrainedModel) -> int | None:
    """The tokens that a sequence may have; None where positions are computed and have no end.

    GPT-2 and its like look positions up in an embedding, and what lies beyond its end is an
    IndexError in the middle of a step. It is told by its rows, which are about as many as the
    configuration's `max_position_embeddings`. Rotary models have none and run beyond that number.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if stated is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not tokens
        and stated <= module.num_embeddings <= stated + _SPARE
    ]
    return min((min(stated, _usable(table)) for table in tables), default=None)


def _usable(table: nn.Embedding) -> int:
    """RoBERTa and its like number positions from the row after that of padding."""
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
