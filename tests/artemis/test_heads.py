"""Heads: which are found, warned of, left out of the targets, and refused."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from artemis import AdapterError, HybridAdapterConfig, add_hybrid_adapter_to_model
from artemis.architectures import classifier_heads
from tests.artemis.models import SMALL, adapted, bert, llama

VISION = SMALL | dict(image_size=8, patch_size=4)
SPEECH = SMALL | dict(
    conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12,
)  # fmt: skip
SERIES = dict(
    num_input_channels=2, context_length=16, patch_length=8, patch_stride=8, d_model=16,
    num_attention_heads=2, num_hidden_layers=1, ffn_dim=16, prediction_length=4,
)  # fmt: skip


def test_heads_of_classification_models_are_found():
    assert adapted(
        bert(), target_modules=["query"], apply_lora_to=["query"]
    ).hybrid_adapter.heads == ("classifier",)
    model = llama(transformers.LlamaForSequenceClassification, num_labels=3)
    assert adapted(model).hybrid_adapter.heads == ("score",)
    assert adapted(llama()).hybrid_adapter.heads == ()


@pytest.mark.parametrize(
    ("cls", "config", "heads"),
    [
        ("CLIPForImageClassification", {"vision_config": VISION}, ("classifier",)),
        ("SiglipForImageClassification", {"vision_config": VISION}, ("classifier",)),
        (
            "WhisperForAudioClassification",
            dict(d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48),
            ("projector", "classifier"),
        ),
        (
            "T5ForQuestionAnswering",
            dict(d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=64),
            ("qa_outputs",),
        ),
        (
            "BlipForQuestionAnswering",
            {"text_config": SMALL | dict(vocab_size=64), "vision_config": VISION},
            (),
        ),
        (
            "DeiTForImageClassificationWithTeacher",
            VISION,
            ("cls_classifier", "distillation_classifier"),
        ),
        ("VideoMAEForVideoClassification", VISION | dict(num_frames=2), ("fc_norm", "classifier")),
        ("Wav2Vec2ForCTC", SPEECH, ("lm_head",)),
        ("Wav2Vec2ForAudioFrameClassification", SPEECH, ("classifier",)),
        (
            "Wav2Vec2ForXVector",
            SPEECH,
            ("projector", "tdnn", "feature_extractor", "classifier", "objective"),
        ),
        (
            "XLMForQuestionAnsweringSimple",
            dict(emb_dim=32, n_layers=1, n_heads=2, n_words=50),
            ("qa_outputs",),
        ),
        ("PatchTSTForClassification", SERIES, ("head",)),
        ("PatchTSTForRegression", SERIES, ("head",)),
        ("SegformerForSemanticSegmentation", {}, ("decode_head",)),
        (
            "PerceiverForSequenceClassification",
            dict(d_model=32, d_latents=32, num_latents=4, num_self_attends_per_block=1),
            ("perceiver.decoder",),
        ),
        ("LlamaForCausalLM", SMALL, ()),
    ],
)
def test_heads_stand_beside_the_base_model_or_its_parts(cls, config, heads):
    cls = getattr(transformers, cls)
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    assert classifier_heads(model) == heads


@pytest.mark.parametrize(
    ("cls", "config", "unknown"),
    [
        (
            "YolosForObjectDetection",
            VISION | dict(image_size=[8, 8]),
            "class_labels_classifier, bbox_predictor",
        ),
        ("PatchTSTForPrediction", SERIES, "head"),
        ("LlamaForCausalLM", SMALL, None),
        ("LlamaForCausalLM", SMALL | dict(tie_word_embeddings=True), None),
        ("BertForMaskedLM", SMALL, None),
        ("BertForNextSentencePrediction", SMALL, None),
        ("PerceiverForMaskedLM", dict(d_model=32, d_latents=32, num_latents=4), None),
        ("RoFormerModel", SMALL | dict(vocab_size=64), None),
        (
            "T5ForConditionalGeneration",
            dict(d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=64),
            None,
        ),
    ],
)
def test_a_head_that_may_be_new_and_stays_frozen_is_warned_of(cls, config, unknown):
    cls = getattr(transformers, cls)
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    target = next(p for p, m in model.named_modules() if type(m) is nn.Linear)
    config = HybridAdapterConfig(target_modules=[target], apply_lora_to=[])
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        add_hybrid_adapter_to_model(model, config)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (unknown is not None)
    if unknown is not None:
        assert f"{cls.__name__}: {unknown}, beside the base model, will stay frozen" in texts[0]
        assert caught[0].filename == __file__
        model.remove_adapter()
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("error")
            adapted(model, fill=False, target_modules=[target], apply_lora_to=[],
                    modules_to_save=[])  # fmt: skip


def test_a_head_is_not_adapted_even_where_it_matches():
    model = adapted(
        bert(),
        target_modules=["query", "classifier"],
        apply_lora_to=["query", "classifier"],
    )
    assert "classifier" not in model.hybrid_adapter.sites


def test_a_tied_head_is_refused():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="lm_head shares a tensor.*embed_tokens"):
        adapted(model, modules_to_save=["lm_head"])
