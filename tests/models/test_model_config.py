"""Reading config.json: both spellings, and every way in which it can be wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import ModelConfig, ModelError, MoEConfig, RopeConfig, load_config, to_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [2, 3],
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 16}
MOE = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN2 = LLAMA | {"model_type": "qwen2"}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 8}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
PRUNED = LLAMA | {"model_type": "jaxdual_pruned", "layer_intermediate_sizes": [48, 16], "o_bias": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read(folder: Path, values: object) -> ModelConfig:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return load_config(folder)


def test_llama_with_what_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == ModelConfig(
        family="llama",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        max_position_embeddings=256,
        eos_token_ids=(2, 3),
    )


def test_biases_of_llama_and_norms_of_qwen3(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (True, True, True, False)
    config = read(tmp_path, {key: value for key, value in QWEN3.items() if key != "head_dim"})
    assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, True, 128)


@pytest.mark.parametrize("base", [LLAMA, QWEN3, MOE])
def test_rope_in_both_spellings(tmp_path: Path, base: dict) -> None:
    old = read(tmp_path, base | {"rope_theta": 5e5, "rope_scaling": YARN})
    new = read(tmp_path, base | {"rope_parameters": YARN | {"rope_theta": 5e5}})
    oldest = read(tmp_path, base | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}})
    assert old == new == oldest
    assert old.rope == RopeConfig(type="yarn", theta=5e5, factor=4.0, original_max_position_embeddings=64)
    assert read(tmp_path, base | {"rope_theta": 5e5, "rope_scaling": None}).rope == RopeConfig(theta=5e5)
    default = {"rope_theta": 5e5, "rope_type": "default"}
    assert read(tmp_path, base | {"rope_parameters": default}).rope == RopeConfig(theta=5e5)


def test_llama3_rope(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = read(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}})
    assert config.rope == RopeConfig(type="llama3", theta=5e5, **scaling)


def test_yarn_magnitude_ratio_becomes_the_attention_factor(tmp_path: Path) -> None:
    rope = read(tmp_path, LLAMA | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}).rope
    assert rope.attention_factor == 1.0
    assert read(tmp_path, LLAMA | {"rope_scaling": YARN | {"mscale": 1.0}}).rope.attention_factor is None


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_experts_in_both_spellings(tmp_path: Path, spelling: str) -> None:
    values = {key: value for key, value in MOE.items() if key != "num_experts"} | {spelling: 4}
    config = read(tmp_path, values | {"mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True})
    assert config.moe == MoEConfig(
        num_experts=4, num_experts_per_tok=2, intermediate_size=24, norm_topk_prob=True, mlp_only_layers=(0,)
    )
    assert [config.is_sparse(layer) for layer in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (MISTRAL, (8, 8)),
        (MISTRAL | {"sliding_window": None}, ()),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, (4096, 4096)),
        (MISTRAL | {"layer_types": ["sliding_attention", "full_attention"]}, (8, None)),
        (MISTRAL | {"layer_types": ["full_attention", "full_attention"]}, ()),
        (MIXTRAL, ()),
        (MIXTRAL | {"sliding_window": 8}, (8, 8)),
        (QWEN2 | {"sliding_window": 8}, ()),
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True}, ()),  # all layers before max_window_layers (28)
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (None, 8)),
        (QWEN2 | {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        (
            QWEN3
            | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            (8, None),
        ),
        (MOE | {"sliding_window": 8, "use_sliding_window": True}, (8, 8)),
    ],
)
def test_windows_of_layers(tmp_path: Path, values: dict, windows: tuple[int | None, ...]) -> None:
    config = read(tmp_path, values)
    assert config.layer_windows == windows
    assert [config.window_of(layer) for layer in range(2)] == list(windows or (None, None))


def test_what_mistral_mixtral_and_qwen2_mean_by_what_is_left_out(tmp_path: Path) -> None:
    few = {key: value for key, value in MIXTRAL.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    config = read(tmp_path, few | {"num_attention_heads": 16, "num_local_experts": None})
    assert (config.num_kv_heads, config.rope.theta, config.rms_norm_eps) == (8, 1e6, 1e-5)
    assert config.moe == MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=48, norm_topk_prob=True)
    assert read(tmp_path, few | {"num_key_value_heads": None}).num_kv_heads == 4
    config = read(tmp_path, QWEN2)
    assert (config.qkv_bias, config.o_bias, config.qk_norm, config.head_dim) == (True, False, False, 8)


def test_windows_of_two_sizes_are_not_written(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL)
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"sizes \[4, 8\]"):
        to_hf(ModelConfig(**fields | {"layer_windows": (4, 8)}))
    with pytest.raises(ValueError, match="layer_windows has 1 entries"):
        ModelConfig(**fields | {"layer_windows": (4,)})


def test_sparse_step_counts_from_one(tmp_path: Path) -> None:
    config = read(tmp_path, MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [config.is_sparse(layer) for layer in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    "values",
    [
        LLAMA | {"attention_bias": True, "tie_word_embeddings": True, "rope_theta": 5e5},
        QWEN3 | {"rope_scaling": YARN | {"attention_factor": 1.5, "truncate": False}, "bos_token_id": 1},
        MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [1], "eos_token_id": 5},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}, "eos_token_id": None},
        MISTRAL,
        MISTRAL | {"layer_types": ["full_attention", "sliding_attention"]},
        MISTRAL | {"sliding_window": None},
        MIXTRAL | {"sliding_window": 16},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        QWEN3 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        MOE | {"use_sliding_window": True, "sliding_window": 16},
        PRUNED,
        PRUNED | {"qkv_bias": True, "mlp_bias": True, "qk_norm": True, "head_dim": 6, "tie_word_embeddings": True},
        PRUNED | {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
        MOE | {"model_type": "jaxdual_pruned", "mlp_only_layers": [0], "layer_intermediate_sizes": [32, 48]},
    ],
)
def test_a_written_configuration_reads_back(tmp_path: Path, values: dict) -> None:
    config = read(tmp_path, values)
    assert read(tmp_path, to_hf(config)) == config


def test_what_a_file_cannot_express_is_not_written(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA)
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match="o_bias is True"):
        to_hf(ModelConfig(**fields | {"o_bias": True}))
    with pytest.raises(
        ModelError,
        match=r"'gpt' is not supported; supported: jaxdual_iha, jaxdual_pruned, llama, mistral, mixtral, qwen2, qwen3,",
    ):
        to_hf(ModelConfig(**fields | {"family": "gpt"}))


def test_a_switch_that_is_off_may_still_change_the_mathematics(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'is_causal' is false"):
        read(tmp_path, QWEN3 | {"is_causal": False})


def test_harmless_and_switched_off_keys_are_accepted(tmp_path: Path) -> None:
    more = {
        "_name_or_path": "x",
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.1,
        "use_cache": True,
        "other_feature": None,
        "pruned_heads": {},
        "pretraining_tp": 1,
    }
    assert read(tmp_path, LLAMA | more) == read(tmp_path, LLAMA)
    assert read(tmp_path, QWEN3 | {"sliding_window": 4096, "use_sliding_window": False}) == read(tmp_path, QWEN3)


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        (
            LLAMA,
            {"model_type": "gpt2"},
            "'model_type' is 'gpt2'; supported: jaxdual_iha, jaxdual_pruned, llama, mistral, mixtral, qwen2, qwen3, ",
        ),
        (LLAMA, {"model_type": None}, "'model_type' is missing"),
        (LLAMA, {"hidden_size": None}, "'hidden_size' is missing"),
        (LLAMA, {"hidden_size": 32.0}, "'hidden_size' is 32.0; an integer"),
        (LLAMA, {"hidden_size": True}, "'hidden_size' is True; an integer"),
        (LLAMA, {"hidden_size": 30}, "'hidden_size' is 30; a multiple of num_attention_heads"),
        (LLAMA, {"hidden_size": 0}, "hidden_size is 0"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads"),
        (LLAMA, {"num_key_value_heads": 3}, r"num_key_value_heads \(3\)"),
        (QWEN3, {"head_dim": 15}, "head_dim is 15"),
        (LLAMA, {"vocab_size": "96"}, "'vocab_size' is '96'"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is '1e-5'"),
        (LLAMA, {"rms_norm_eps": 10**400}, "'rms_norm_eps'"),
        (LLAMA, {"eos_token_id": "2"}, "'eos_token_id'"),
        (LLAMA, {"eos_token_id": [-1]}, "eos_token_id"),
        (LLAMA, {"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1; true or false"),
        (LLAMA, {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        (LLAMA, {"sliding_window": 512}, "'sliding_window' is 512"),
        (QWEN3, {"sliding_window": 0, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window is 0"),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'.*no sliding_window"),
        (MOE, {"use_sliding_window": True, "max_window_layers": 1}, "'max_window_layers' is 1, which versions"),
        (LLAMA, {"max_window_layers": 1}, "'max_window_layers' is 1"),
        (MISTRAL, {"sliding_window": -4}, "sliding_window is -4"),
        (MISTRAL, {"sliding_window": "8"}, "'sliding_window' is '8'"),
        (MISTRAL, {"layer_types": ["sliding_attention", "chunked_attention"]}, "'layer_types'"),
        (MISTRAL, {"attention_bias": True}, "'attention_bias' is true"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (QWEN2, {"mlp_bias": True}, "'mlp_bias'"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
        (LLAMA, {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "'quantization_config'"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
        (LLAMA, {"logit_scale": 0.1}, "'logit_scale' is 0.1"),
        (QWEN3, {"mlp_bias": True}, "'mlp_bias'"),
        (LLAMA, {"rope_theta": -1}, "rope theta is -1"),
        (LLAMA, {"rope_theta": "1e4"}, "'rope_theta'"),
        (LLAMA, {"rope_scaling": "yarn"}, "'rope_scaling' is 'yarn'; an object"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'rope_scaling.rope_type' is 'longrope'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2}}, "'rope_scaling.rope_type' is 'dynamic'"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        (LLAMA, {"rope_scaling": YARN | {"short_factor": [1.0]}}, "'rope_scaling.short_factor'"),
        (LLAMA, {"rope_scaling": YARN | {"mrope_section": [1]}}, "'rope_scaling.mrope_section'"),
        (LLAMA, {"rope_scaling": YARN | {"mscale": -1, "mscale_all_dim": 1}}, "'rope_scaling.mscale' is -1"),
        (LLAMA, {"rope_parameters": {"full_attention": YARN}}, "'rope_parameters.full_attention'"),
        (LLAMA, {"rope_parameters": YARN, "rope_scaling": YARN}, "'rope_parameters' are both set"),
        (LLAMA, {"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 3.0}, "'rope_theta' is 3.0, but 2.0"),
        (MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        (MOE, {"num_experts": None}, "'num_experts' is missing"),
        (MOE, {"num_local_experts": 8}, "'num_experts' is 4, but num_local_experts is 8"),
        (MOE, {"mlp_only_layers": [2]}, "mlp_only_layers names 2"),
        (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        (PRUNED, {"layer_intermediate_sizes": [48]}, "layer_intermediate_sizes has 1 entries; num_hidden_layers is 2"),
        (PRUNED, {"layer_intermediate_sizes": [48, 0]}, "layer_intermediate_sizes is 0 to 48; at least 1"),
        (PRUNED, {"layer_intermediate_sizes": [49, 8]}, r"layer_intermediate_sizes is 8 to 49.*\(48\) as the largest"),
        (PRUNED, {"layer_intermediate_sizes": [48, 8.0]}, "'layer_intermediate_sizes' is .*a list of integers"),
        (PRUNED, {"attention_bias": True}, "'attention_bias' is true"),
        (PRUNED, {"o_bias": 1}, "'o_bias' is 1; true or false"),
        (PRUNED, {"num_experts_per_tok": 2}, "'num_experts_per_tok' is 2"),
        (LLAMA, {"layer_intermediate_sizes": [48, 16]}, "'layer_intermediate_sizes' is"),
        (MOE, {"shared_expert_intermediate_size": 8}, "'shared_expert_intermediate_size' is 8"),
    ],
)
def test_an_unusable_key_is_named_with_its_file(tmp_path: Path, base: dict, change: dict, key: str) -> None:
    with pytest.raises(ModelError, match=key) as error:
        read(tmp_path, base | change)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1e}', "\ud800"])
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load_config(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
WINDOW_KEYS = ["sliding_window", "use_sliding_window", "max_window_layers", "num_local_experts"]
KEYS = [
    *sorted(MOE),
    *WINDOW_KEYS,
    *sorted(PRUNED.keys() - MOE.keys()),
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "mlp_only_layers",
    "hidden_act",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([LLAMA, QWEN2, QWEN3, MOE, MISTRAL, MIXTRAL, PRUNED]),
    key=st.sampled_from(KEYS),
    value=json_values,
)
def test_any_value_gives_a_configuration_or_a_model_error(tmp_path: Path, base: dict, key: str, value: object) -> None:
    try:
        config = read(tmp_path, base | {key: value})
    except ModelError as error:
        assert "config.json" in str(error)  # noqa: PT017
    else:
        assert isinstance(config, ModelConfig)
