"""What Artemis knows about model architectures: one table, no function per model."""

import re

from torch import nn
from torch.nn.utils import parametrize

from .layers.linear import linear_features
from .layers.packed import is_packed

#: Siblings (same parent) that read the same tensor.
READ_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, Whisper
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next
    ("gate_proj", "up_proj"),  # Llama's feed-forward layer
    ("wi_0", "wi_1"),  # T5 1.1
)
#: Names of modules in which the queries come from another tensor than the keys and values.
CROSS_ATTENTION = (
    "encoder_attn", "crossattention", "cross_attn", "cross_attention", "EncDecAttention",
    "encoder_decoder_attention",
)  # fmt: skip
#: In the names of the model classes whose head starts untrained.
CLASSIFIERS = re.compile(
    r"For(\w*(Classification|QuestionAnswering)|MultipleChoice|SemanticSegmentation|Regression"
    r"|CTC|\w*XVector)"
)
#: The same of those whose heads come with the checkpoint.
PRETRAINED = re.compile(r"For(\w*(LM|Generation|Modeling)|Pre[Tt]raining|NextSentencePrediction)")
#: Prefix of a base model -> the head of a classifier that it holds itself.
INNER_HEADS = {"perceiver": "decoder"}
#: Class of a module -> its linear layers whose weight it, or the model, reads or writes itself,
#: always or on some paths (at inference, in training, with a fused kernel, in some version): there
#: the layer's own forward may not run.
WEIGHTS_READ = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "DetrMHAttentionMap": ("k_proj", "k_linear"),
    "ConditionalDetrMHAttentionMap": ("k_proj", "k_linear"),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LSHSelfAttention": ("query_key", "value"),  # Reformer
    "RwkvSelfAttention": ("output",),  # these two are rescaled between training and inference
    "RwkvFeedForward": ("value",),
    "TDNNLayer": ("kernel",),  # Wav2Vec2 and its kin, for x-vectors
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
    "LongcatFlashTopkRouter": ("classifier",),
    "DeepseekV2Moe": ("gate",),
    "BloomAttention": ("dense",),
    "BloomMLP": ("dense_4h_to_h",),
    "VideoMAESelfAttention": ("query", "key", "value"),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "linear2"),
}
#: Class in `WEIGHTS_READ` -> what its module has where it does so; without, the layers run.
READ_ONLY_WITH = {
    "BloomAttention": "slow_but_exact",
    "BloomMLP": "slow_but_exact",
    "VideoMAESelfAttention": "q_bias",  # of older transformers
}


def reader_of(model: nn.Module, path: str) -> str | None:
    """The parent's class, where the weight of the layer at `path` is read past it, or None."""
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    for cls in type(parent).__mro__:
        for known in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}"):
            if name in WEIGHTS_READ.get(known, ()) and _reads(parent, known):
                return cls.__name__
    return None


def _reads(parent: nn.Module, known: str) -> bool:
    if known not in READ_ONLY_WITH:
        return True
    value = getattr(parent, READ_ONLY_WITH[known], None)
    return value is not None and value is not False


def is_block(module: nn.Module) -> bool:
    """Whether `module` is a block of layers, whose output can be adapted.

    Layers need not be linear ones: experts and routers of some models are plain parameters.
    """
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or parametrize.is_parametrized(module):
        return False
    return any(_has_weights(child) for child in module.modules() if child is not module)


def _has_weights(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return (
        is_packed(module)
        or linear_features(module) is not None
        or any(p.is_floating_point() for p in own)
    )


def stacked_weights(module: nn.Module) -> list[str]:
    """Names of the parameters of `module` that are many matrices in one, as those of experts are.

    Torch's own modules have none: a convolution's weight is one matrix in another shape.
    """
    bases = (cls for cls in type(module).__mro__ if cls is not nn.Module)
    if any(cls.__module__.startswith("torch.") for cls in bases):
        return []
    own = module.named_parameters(recurse=False)
    return [n for n, p in own if p.is_floating_point() and sum(size > 1 for size in p.shape) > 2]


def hidden_size(model: nn.Module, path: str) -> int | None:
    """Size of the tensors between the blocks around `path`, where a configuration states one.

    It is that of the innermost module with a configuration: the towers for pictures and sound of
    a model that also reads text have their own.
    """
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    configs = (getattr(module, "config", None) for module in around)
    config = next((config for config in configs if config is not None), None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)


def input_of(path: str) -> str:
    """Name the tensor that the module at `path` reads: equal for siblings that share it."""
    parent, _, name = path.rpartition(".")
    crossing = any(part in CROSS_ATTENTION for part in parent.split("."))
    for row in READ_TOGETHER:
        readers = row[1:] if crossing else row
        if name in readers:
            return f"{parent}.[{' '.join(readers)}]"
    return path


def classifier_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of the heads of a classification model: what stands beside its base model."""
    if not CLASSIFIERS.search(type(model).__name__):
        return ()
    base = getattr(model, "base_model_prefix", "")
    inner = INNER_HEADS.get(base)
    return _beside_base(model) or ((f"{base}.{inner}",) if inner else ())


def unknown_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of what may be a new head, in a model for a task that the tables do not name."""
    name = type(model).__name__
    known = CLASSIFIERS.search(name) or PRETRAINED.search(name)
    if known or not re.search("For[A-Z]", name) or output_head(model) is not None:
        return ()
    return _beside_base(model)


def _beside_base(model: nn.Module) -> tuple[str, ...]:
    """Paths of what `model` holds beside its base model, with parameters.

    Some hold no base model under its usual name but its parts (CLIP's `vision_model`, Whisper's
    `encoder`; T5's `shared`, `encoder` and `decoder`): models, or an embedding, themselves.
    """
    base = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, child in model.named_children()
        if name != base
        and not hasattr(child, "base_model_prefix")  # a model: its class takes seconds to import
        and not isinstance(child, nn.Embedding)
        and next(child.parameters(), None) is not None
    )


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits, where the model names one."""
    named = getattr(model, "get_output_embeddings", None)
    return None if named is None else named()
