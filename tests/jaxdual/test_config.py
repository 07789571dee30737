"""Configuration: ranges, and flags over variables over the file."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jaxdual import LLM, AsyncLLM
from jaxdual.config import (
    ClusterConfig,
    ConfigError,
    EngineConfig,
    ServerConfig,
)
from jaxdual.config_sources import add_arguments, read_config, read_config_file
from jaxdual.scheduling.dispatch import DISPATCH_POLICIES, GimbalThresholds
from jaxdual.scheduling.expert_policies import EXPERT_PLACEMENTS, WINDOW
from jaxdual.scheduling.experts import INTERVAL
from jaxdual.scheduling.queues import AGE_LIMIT, QUEUE_POLICIES


def from_args(arguments: list[str], environment: dict[str, str] | None = None) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    return read_config(EngineConfig, parser.parse_args(arguments), environment or {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_model_len", value) for value in (0, -1, 1.5)),
        *(("num_kv_blocks", value) for value in (0, -1, 1.5)),
        *(("kv_cache_memory_bytes", value) for value in (0, -1, 1.5)),
        *(("block_size", value) for value in (0, None, "x")),
        *(("max_num_seqs", value) for value in (0, None, "x")),
        *(("max_num_batched_tokens", value) for value in (0, None, "x")),
        *(("host_cache_bytes", value) for value in (-1, float("nan"), float("inf"), True, [])),
        *(("gpu_memory_utilization", value) for value in (0, 1.1, -0.5, float("nan"), "nan", "much", True, None)),
        *(("dtype", value) for value in ("float64", None, 32, [])),
        *(("load_format", value) for value in ("safetensors", None, "")),
        *(("preemption_mode", value) for value in ("drop", None, "")),
        *((name, value) for name in ("enable_prefix_caching", "async_scheduling") for value in (1, "yes", None, "")),
        *(("seed", value) for value in ("", 0.5, "1.5")),
        *(("model", value) for value in (5, b"x", ["a"])),
    ],
)
def test_a_bad_value_is_refused_with_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("block_size", "16", 16),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("enable_prefix_caching", "False", False),
        ("async_scheduling", "0", False),
        ("seed", "-3", -3),
        ("dtype", "bfloat16", "bfloat16"),
        ("model", "some/name", "some/name"),
    ],
)
def test_text_is_read_as_the_setting_s_type(name: str, text: str, value: object) -> None:
    got = getattr(EngineConfig.from_mapping({name: text}), name)
    assert got == value
    assert type(got) is type(value)


def test_a_path_becomes_text_and_a_whole_float_a_number() -> None:
    config = EngineConfig(model=Path("/models/one"), block_size=32.0)  # type: ignore[arg-type]
    assert config.model == "/models/one"
    assert isinstance(config.block_size, int)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8 must be at least max_num_seqs=9"):
        EngineConfig(max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ConfigError, match="host_cache_bytes"):
        EngineConfig(preemption_mode="swap")
    assert EngineConfig(preemption_mode="swap", host_cache_bytes=1).preemption_mode == "swap"


def test_unknown_settings_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'blok_size'; known are model, .*block_size"):
        EngineConfig.from_mapping({"blok_size": 1})


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('block-size = 8\nmax_num_seqs = 3\nseed = 1\ndtype = "float16"\n')
    environment = {"JAXDUAL_MAX_NUM_SEQS": "4", "JAXDUAL_SEED": "2", "JAXDUAL_ASYNC_SCHEDULING": "false"}
    config = from_args(["--config", str(file), "--seed", "5", "--no-enable-prefix-caching"], environment)
    assert (config.block_size, config.max_num_seqs, config.seed, config.dtype) == (8, 4, 5, "float16")
    assert (config.async_scheduling, config.enable_prefix_caching) == (False, False)


def test_a_flag_switches_on_what_a_variable_switched_off() -> None:
    assert from_args(["--async-scheduling"], {"JAXDUAL_ASYNC_SCHEDULING": "0"}).async_scheduling


def test_without_anything_the_defaults_hold() -> None:
    assert from_args([]) == EngineConfig()


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_a_bad_value_has_the_same_message_from_everywhere(source: str, tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('block_size = "many"\n')
    arguments = {"flag": ["--block-size", "many"], "variable": [], "file": ["--config", str(file)]}[source]
    environment = {"JAXDUAL_BLOCK_SIZE": "many"} if source == "variable" else {}
    with pytest.raises(ConfigError, match=r"^block_size='many' must be a whole number$"):
        from_args(arguments, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"block_size = ", "not a TOML file"), (b"\xff\xfe", "not a TOML file"), (None, "can't be read")],
)
def test_an_unusable_file_is_named(text: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"engine\.toml: {message}"):
        read_config_file(file)


def test_unknown_names_in_a_file_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[engine]\nblock_size = 4\n")
    with pytest.raises(ConfigError, match="unknown setting 'engine'"):
        from_args(["--config", str(file)])


def test_every_setting_has_a_flag_with_its_description() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig, ServerConfig)
    text = parser.format_help()
    for field in (*fields(EngineConfig), *fields(ServerConfig)):
        assert "--" + field.name.replace("_", "-") in text


def test_one_file_and_one_environment_serve_engine_and_server(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max-num-seqs = 8\nport = 9000\nshutdown_timeout = 5\n")
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig, ServerConfig)
    options = parser.parse_args(["--config", str(file), "--grpc-port", "9001"])
    variables = {"JAXDUAL_PORT": "9002", "JAXDUAL_BLOCK_SIZE": "16"}
    engine, server = (read_config(kind, options, variables) for kind in (EngineConfig, ServerConfig))
    assert (engine.max_num_seqs, engine.block_size) == (8, 16)
    assert (server.port, server.grpc_port, server.shutdown_timeout) == (9002, 9001, 5.0)
    assert from_args(["--config", str(file)], variables).max_num_seqs == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": -1}, r"port=-1 must be in \[0, 65535\]"),
        ({"grpc_port": 65536}, "grpc_port=65536"),
        ({"port": 7, "grpc_port": 7}, "port=7 and grpc_port must be different"),
        ({"max_queued_requests": -1}, "max_queued_requests=-1 must be at least 0"),
        ({"shutdown_timeout": float("inf")}, "shutdown_timeout=inf"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout=nan"),
        ({"ssl_certfile": "/nowhere"}, "given together"),
        ({"ssl_certfile": "/nowhere", "ssl_keyfile": "/nowhere"}, "ssl_certfile='/nowhere' can't be read"),
        ({"api_key": ""}, "must not be empty"),
    ],
)
def test_a_server_setting_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**values)


def test_what_only_clusters_have_a_use_for_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="path_mode='split' needs prefill and decode"):
        ClusterConfig(path_mode="split")
    assert ClusterConfig(path_mode="split", prefill=1, decode=1)
    with pytest.raises(ConfigError, match="kv_transport='verbs' needs a cluster"):
        AsyncLLM.from_config(EngineConfig(kv_transport="verbs"))
    with pytest.raises(ConfigError, match="kv_transport='tcp' needs a cluster"):
        LLM.from_config(EngineConfig(kv_transport="tcp"))


def test_policies_have_the_names_and_defaults_that_they_are_made_with() -> None:
    """The configuration imports none of them, so that a front is light."""
    hints, default = get_type_hints(EngineConfig), EngineConfig()
    for setting, names in (
        ("scheduling_policy", QUEUE_POLICIES),
        ("dispatch_policy", DISPATCH_POLICIES),
        ("expert_placement", EXPERT_PLACEMENTS),
    ):
        assert get_args(hints[setting]) == names
    made = GimbalThresholds()
    for name in ("theta_kv", "theta_diff", "theta_load", "user_ttl"):
        assert getattr(default, name) == getattr(made, name)
    assert (default.theta_age, default.expert_interval, default.expert_window) == (AGE_LIMIT, INTERVAL, WINDOW)
