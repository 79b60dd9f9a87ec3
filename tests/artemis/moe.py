"""Tiny random mixture-of-experts models, and their truth: the same over dequantized experts."""

import torch
import transformers
from torch import nn

from artemis.layers.packed import packed_modules
from artemis.layers.packed_experts import QuantizedExperts
from tests.artemis.models import SMALL, TOKENS

#: Computing by the model's own code, which knows fp64.
EAGER = dict(experts_implementation="eager")
HEADS = dict(num_key_value_heads=2, num_experts_per_tok=2)


def mixtral(**changes) -> nn.Module:
    """4 experts of 48 units over hidden 32, 2 to a token."""
    own = dict(num_local_experts=4)
    return _model(transformers.MixtralForCausalLM, transformers.MixtralConfig, own | changes)


def qwen3_moe(**changes) -> nn.Module:
    own = dict(num_experts=4, head_dim=8, moe_intermediate_size=24)
    return _model(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, own | changes)


def gpt_oss(**changes) -> nn.Module:
    """Matrices stored (in, out), biases, gate and up interleaved, a gate of its own."""
    own = dict(num_local_experts=4, head_dim=8)
    return _model(transformers.GptOssForCausalLM, transformers.GptOssConfig, own | changes)


def deepseek_v3(**changes) -> nn.Module:
    """A shared expert, of linear layers, beside the others; the first layer is dense."""
    own = dict(
        n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=None, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=24,
        first_k_dense_replace=1, num_hidden_layers=2, num_key_value_heads=4,
    )  # fmt: skip
    return _model(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, own | changes)


MODELS = {f.__name__: f for f in (mixtral, qwen3_moe, gpt_oss, deepseek_v3)}


def _model(cls: type, config: type, sizes: dict) -> nn.Module:
    return filled(cls(config(**SMALL | TOKENS | HEADS | EAGER | sizes)).eval())


def without_gate() -> nn.Module:
    """Nemotron's experts: an activation of one matrix's output, no gate."""
    config = transformers.NemotronHConfig(
        hidden_size=32, moe_intermediate_size=24, n_routed_experts=4, **EAGER
    )
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    return filled(NemotronHExperts(config))


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Give parameters values of a size that shows: as initialized, experts add next to nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj") or name.endswith("_bias"):
            parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def fp64(module: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` in fp64 with the weights that the packed numbers of `module` stand for."""
    plain.double()
    for path, packed in packed_modules(module):
        target = plain.get_submodule(path)
        if not isinstance(packed, QuantizedExperts):
            target.weight.copy_(packed.weight.dequantize(torch.float64))
            continue
        for name in packed.packed_shapes():
            stack = torch.stack([w.dequantize(torch.float64) for w in getattr(packed, name)])
            getattr(target, name).copy_(stack.mT if target.is_transposed else stack)
    return plain
