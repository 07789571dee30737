"""The family jaxdual_pruned: what other families' formats can't express, and nothing else changes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from models import ModelConfig, pruned_form
from models.convert import main as convert
from models.fingerprint import model_fingerprint
from models.shapes import parameters_of, with_parameters
from models.upcycle import upcycled
from tests.models.test_logit_parity import CASES, HF, assert_close, expected
from tests.models.test_model_checkpoint import assert_same_parameters
from tests.pruned_models import KINDS, random_model, with_even_widths, write

PROMPT = np.random.default_rng(3).integers(96, size=(2, 40))


@pytest.mark.parametrize("case", CASES)
def test_models_of_other_families_keep_the_logits_of_transformers(case: str, tmp_path: Path) -> None:
    source = models.load(HF / case, dtype="float32")
    config = dataclasses.replace(source.config, family="jaxdual_pruned")
    models.save(with_parameters(config, parameters_of(source)), tmp_path, dtype="float32")
    model = models.load(tmp_path, dtype="float32")
    assert model.config == config
    for prompt, logits in expected(case):
        assert_close(model.logits(prompt[None])[0], logits)


@pytest.mark.parametrize("name", KINDS)
def test_uneven_widths_are_neurons_of_zeros_less(name: str) -> None:
    model = random_model(KINDS[name])
    even = with_even_widths(model)
    assert sum(one.size for one in parameters_of(even).values()) > sum(
        one.size for one in parameters_of(model).values()
    )
    np.testing.assert_allclose(model.logits(PROMPT), even.logits(PROMPT), atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_loads_the_same(name: str, tmp_path: Path) -> None:
    model = random_model(KINDS[name])
    write(name, tmp_path / "a")
    assert_same_parameters(models.load(tmp_path / "a", dtype="float32"), model)
    assert convert(["--to", "orbax", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert_same_parameters(models.load(tmp_path / "b", dtype="float32"), model)


def test_fingerprints_tell_widths_and_biases_apart(tmp_path: Path) -> None:
    narrower = dataclasses.replace(KINDS["pruned"], layer_intermediate_sizes=(16, 48, 7))
    digests = {model_fingerprint(write("pruned", tmp_path / "a"), "float32")}
    models.save(random_model(narrower), tmp_path / "b", dtype="float32")
    models.save(random_model(dataclasses.replace(KINDS["pruned"], o_bias=False)), tmp_path / "c", dtype="float32")
    digests |= {model_fingerprint(tmp_path / name, "float32") for name in "bc"}
    assert len(digests) == 3


def test_a_weight_of_another_width_is_named(tmp_path: Path) -> None:
    write("pruned", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("    8\n", "    7\n"))
    with pytest.raises(models.ModelError, match=r"layers\.2\.mlp\.(down|gate)_proj.*' has shape"):
        models.load(tmp_path)


def config_of(case: str) -> ModelConfig:
    return models.load_config(HF / case)


@pytest.mark.parametrize("case", CASES)
def test_a_model_stays_in_its_family_as_long_as_the_format_can_say_it(case: str) -> None:
    config = config_of(case)
    assert pruned_form(config) == config
    smaller = dataclasses.replace(config, num_heads=config.num_heads // 2, num_kv_heads=config.num_kv_heads // 2)
    assert pruned_form(smaller) == smaller
    uneven = (config.intermediate_size, *(3,) * (config.num_layers - 1))
    for change in ({"o_bias": not config.o_bias}, {"layer_intermediate_sizes": uneven}):
        changed = dataclasses.replace(config, **change)
        assert pruned_form(changed) == dataclasses.replace(changed, family="jaxdual_pruned")


def test_narrower_llamas_with_biases_everywhere_are_llamas() -> None:
    config = dataclasses.replace(config_of("llama_biases"), intermediate_size=16)
    assert pruned_form(config) == config
    assert pruned_form(dataclasses.replace(config, mlp_bias=False)).family == "llama"


def test_what_no_format_expresses_is_refused() -> None:
    config = dataclasses.replace(config_of("llama"), layer_windows=(4, 8), num_layers=2)
    with pytest.raises(ValueError, match="layer_windows has sizes"):
        pruned_form(config)
    iha = dataclasses.replace(KINDS["pruned"], family="jaxdual_iha", iha=models.IHAConfig(pseudo_heads=2, layers=(0,)))
    with pytest.raises(ValueError, match="iha is IHAConfig"):
        pruned_form(iha)
    with pytest.raises(ValueError, match="layer_intermediate_sizes is "):
        models.to_hf(
            dataclasses.replace(config_of("qwen3"), layer_intermediate_sizes=(48,) * config_of("qwen3").num_layers)
        )
    with pytest.raises(models.ModelError, match="'jaxdual_pruned' cannot be upcycled"):
        upcycled(random_model(KINDS["pruned"]), models.IHAConfig(pseudo_heads=2, layers=(0,)))


def test_parameters_that_do_not_fit_are_named() -> None:
    config = KINDS["pruned"]
    parameters = parameters_of(random_model(config))
    with pytest.raises(ValueError, match=r"'layers\.2\.mlp\.\w+\.\w+' has shape"):
        with_parameters(dataclasses.replace(config, layer_intermediate_sizes=(16, 48, 7)), parameters)
    with pytest.raises(ValueError, match=r"'layers\.0\.attention\.o\.bias' has no place"):
        with_parameters(dataclasses.replace(config, o_bias=False), parameters)
    with pytest.raises(ValueError, match=r"'layers\.0\.attention\.k\.bias' is missing"):
        with_parameters(dataclasses.replace(config, qkv_bias=True), parameters)


def test_a_model_of_parameters_is_the_model() -> None:
    model = random_model(KINDS["pruned"])
    again = with_parameters(model.config, parameters_of(model))
    for one, other in zip(jax.tree.leaves(parameters_of(again)), jax.tree.leaves(parameters_of(model)), strict=True):
        np.testing.assert_array_equal(one, other)
