"""Tiny random models, and what the tests do to them."""

import torch
import transformers
from torch import nn

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model

VOCABULARY = 64
TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
#: Sizes of an encoder under the names that most configurations have.
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)


def llama(cls=transformers.LlamaForCausalLM, **changes) -> nn.Module:
    """2 layers, hidden 32; fewer key than query heads give k and v shapes of their own."""
    config = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **TOKENS,
    )  # fmt: skip
    return cls(transformers.LlamaConfig(**config | changes)).eval()


def gpt2() -> nn.Module:
    """Its linear layers are Conv1D, with weights stored (in, out)."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **TOKENS)
    return with_biases(transformers.GPT2LMHeadModel(config).eval())


def bert(cls=transformers.BertForSequenceClassification, **changes) -> nn.Module:
    """An encoder with a classification head of 3 labels; no dropout of its own."""
    config = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    return with_biases(cls(transformers.BertConfig(**config | changes)).eval())


def t5() -> nn.Module:
    """An encoder and a decoder with cross attention; no dropout of its own."""
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, dropout_rate=0.0,
        decoder_start_token_id=0, vocab_size=VOCABULARY,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def with_biases(model: nn.Module) -> nn.Module:
    """Give the biases values: at zero, as transformers starts them, a lost one would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(std=0.1)
    return model


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length))


def adapted(model: nn.Module, fill: bool = True, **settings) -> nn.Module:
    """Add an adapter of rank 4 and width 8; `fill` sets its zero tensors, as training would."""
    settings = dict(lora_rank=4, adapter_size=8) | settings
    add_hybrid_adapter_to_model(model, HybridAdapterConfig(**settings))
    if fill:
        fill_bank(model)
    return model


@torch.no_grad()
def fill_bank(model: nn.Module, deviation: float = 0.3) -> None:
    """Give every adapter tensor random values, gains near one."""
    for name, parameter in model.hybrid_adapter.named_parameters():
        parameter.normal_(std=deviation)
        if name.startswith("gain."):
            parameter.add_(1.0)


def enable_checkpointing(model: nn.Module, **options) -> None:
    """Activation checkpointing under the name that this version of transformers prefers."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(options or None)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The model has exactly the tensors of `state`, bit for bit."""
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(now[name], tensor), name


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients of everything that trains."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}
