"""`HybridAdapterConfig`: the user's defaults, YAML, and one clear error for each mistake."""

import pytest

from artemis import AdapterError, HybridAdapterConfig

# The block of the user's document, comments included.
USER_YAML = """
hybrid_adapter:
  enabled: true
  lora_rank: 8  # Rank for LoRA components
  adapter_size: 64  # Bottleneck dimension for traditional adapters
  adapter_dropout: 0.1  # Dropout rate for adapters
  shared_parameters: true  # Whether to share parameters across layers
  target_modules:  # Which modules to apply adaptation to
    - "q_proj"
    - "k_proj"
    - "v_proj"
    - "o_proj"
    - "gate_proj"
    - "up_proj"
    - "down_proj"
  apply_lora_to:  # Which modules use LoRA (others use adapters)
    - "q_proj"
    - "k_proj"
    - "v_proj"
    - "o_proj"
  scaling_factor: 0.5  # Scaling factor for LoRA
"""


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_users_block_gives_the_defaults(tmp_path):
    assert HybridAdapterConfig.from_yaml(write(tmp_path, USER_YAML)) == HybridAdapterConfig()


def test_only_the_section_of_a_training_file_counts(tmp_path):
    text = "model: {name: x}\ntraining: {lora_rank: 99}\nhybrid_adapter: {lora_rank: 3}\n"
    config = HybridAdapterConfig.from_yaml(write(tmp_path, text))
    assert config == HybridAdapterConfig(lora_rank=3)


def test_an_empty_section_gives_the_defaults(tmp_path):
    assert HybridAdapterConfig.from_yaml(write(tmp_path, "hybrid_adapter:\n")) == (
        HybridAdapterConfig()
    )


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("5e-1", 0.5), ("1", 1), ("2.", 2.0)])
def test_yaml_numbers_are_numbers(tmp_path, text, value):
    text = f"hybrid_adapter: {{scaling_factor: {text}}}"
    assert HybridAdapterConfig.from_yaml(write(tmp_path, text)).scaling_factor == value


def test_to_dict_is_read_back_as_the_same():
    config = HybridAdapterConfig(
        target_modules=["q_proj", "mlp"], layers=[1, 3], modules_to_save=["score"], impl="eager"
    )
    assert HybridAdapterConfig.from_dict(config.to_dict()) == config


def test_lora_by_default_goes_to_the_targets_that_the_default_names():
    config = HybridAdapterConfig(target_modules=["q_proj", "self_attn.v_proj", "fc1"])
    assert config.apply_lora_to == ("q_proj", "self_attn.v_proj")


BAD_VALUES = [
    ("enabled", 1, "true or false"),
    ("lora_rank", 0, "an integer from 1"),
    ("lora_rank", -2, "an integer from 1"),
    ("lora_rank", True, "an integer from 1"),
    ("lora_rank", 8.0, "an integer from 1"),
    ("lora_rank", "8", "an integer from 1"),
    ("adapter_size", None, "an integer from 1"),
    ("adapter_dropout", 1.0, "a number in [0, 1)"),
    ("adapter_dropout", -0.1, "a number in [0, 1)"),
    ("lora_dropout", "much", "a number in [0, 1)"),
    ("lora_dropout", float("nan"), "a number in [0, 1)"),
    ("shared_parameters", "yes", "true or false"),
    ("scaling_factor", 0, "a number above 0"),
    ("scaling_factor", float("inf"), "a number above 0"),
    ("adapter_scale", -1.0, "a number above 0"),
    ("target_modules", [], "a list of module names"),
    ("target_modules", "", "regular expression"),
    ("target_modules", "q_(proj", "regular expression"),
    ("target_modules", ["q_proj", 3], "a list of module names"),
    ("target_modules", {"q_proj": 8}, "a list of module names"),
    ("apply_lora_to", ["q_proj", "c_attn"], "names in target_modules"),
    ("exclude_modules", None, "a list of module names"),
    ("layers", [], "a list of layer numbers"),
    ("layers", [-1], "a list of layer numbers"),
    ("layers", 3, "a list of layer numbers"),
    ("activation", "tanh", "one of relu, gelu, gelu_tanh, silu, identity"),
    ("init", "zeros", "one of default, gaussian, orthogonal"),
    ("orthogonality_weight", -1, "a number from 0"),
    ("orthogonality_form", "l1", "one of cosine, frobenius"),
    ("adapter_dtype", "bf16", "one of float32, model"),
    ("dropout_mask_sharing", "layer", "one of input, module"),
    ("modules_to_save", "classifier", "a list of module names"),
    ("impl", "cuda", "one of null, triton, eager, reference"),
]


@pytest.mark.parametrize("key, value, allowed", BAD_VALUES)
def test_a_bad_value_is_named_with_what_is_allowed(key, value, allowed):
    with pytest.raises(AdapterError) as error:
        HybridAdapterConfig.from_dict({key: value})
    assert f"hybrid_adapter.{key}: got" in str(error.value)
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(AdapterError, match=r"unknown key 'lora_rang'; did you mean 'lora_rank'"):
        HybridAdapterConfig.from_dict({"lora_rang": 8})
    with pytest.raises(AdapterError, match=r"unknown key 'zzz'; allowed: enabled, lora_rank"):
        HybridAdapterConfig.from_dict({"zzz": 8})


def test_lora_must_be_chosen_where_the_default_names_no_target():
    with pytest.raises(AdapterError, match=r"apply_lora_to: not given.*\[\] for bottlenecks only"):
        HybridAdapterConfig(target_modules=["c_attn"])
    assert HybridAdapterConfig(target_modules=["c_attn"], apply_lora_to=[]).apply_lora_to == ()


def test_a_penalty_without_lora_is_refused():
    with pytest.raises(AdapterError, match="orthogonality_weight"):
        HybridAdapterConfig(apply_lora_to=[], orthogonality_weight=0.1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora_rank: 8\n", r"got lora_rank, allowed: a file with a `hybrid_adapter:` section"),
        ("- 1\n", r"got list, allowed"),
        ("", r"got NoneType, allowed"),
        ("hybrid_adapter: [1]\n", r"got \[1\], allowed: a mapping"),
        ("hybrid_adapter: {lora_rank: 8\n", r"not valid YAML.*line"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(AdapterError, match=message) as error:
        HybridAdapterConfig.from_yaml(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        HybridAdapterConfig.from_yaml(tmp_path / "none.yaml")
