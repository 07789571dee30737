"""Models with packed projections: the logits of the dense ones, in smaller files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from jaxdual.parallel.mesh import ParallelSizes
from jaxdual.pruning.linears import linears_of
from jaxdual.pruning.pack import main as pack_command
from jaxdual.pruning.pack import packed_form, packed_model
from models.convert import main as convert
from models.packed import BlockSparseLinear, PackedLinear
from models.packed_config import PackedConfig
from models.shapes import parameters_of
from tests.models.test_model_checkpoint import assert_same_parameters
from tests.packed_models import KINDS, dense, packed, projection_bytes, tokens, write


@pytest.mark.parametrize("name", KINDS)
def test_packed_projections_give_the_logits_of_the_dense_ones(name: str) -> None:
    one, other = dense(name), packed(name)
    np.testing.assert_allclose(other.logits(tokens()), one.logits(tokens()), atol=2e-5)
    kinds = {type(layer.attention.q) for layer in other.layers} | {type(layer.attention.o) for layer in other.layers}
    assert kinds == {BlockSparseLinear if "blocks" in name else PackedLinear}


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_model_loads_the_same(name: str, tmp_path: Path) -> None:
    write(name, tmp_path / "a")
    model = models.load(tmp_path / "a", dtype="float32")
    assert model.config == packed(name).config
    assert_same_parameters(model, packed(name))
    assert convert(["--to", "orbax", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert_same_parameters(models.load(tmp_path / "b", dtype="float32"), model)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_random_weights_has_the_same_shapes_and_works(name: str) -> None:
    config = packed(name).config
    model = models.init(config)
    assert {path: (one.shape, one.dtype) for path, one in parameters_of(model).items()} == {
        path: (one.shape, one.dtype) for path, one in parameters_of(packed(name)).items()
    }
    logits = np.asarray(model.logits(tokens()))
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_packed_weights_are_nine_sixteenths_in_memory_and_in_the_file(tmp_path: Path) -> None:
    one, other = dense("packed_2_4"), packed("packed_2_4")
    assert projection_bytes(other) == projection_bytes(one) * (16 + 1) // 32  # float32
    sizes = {}
    for kind, model in (("dense", one), ("packed", other)):
        models.save(model, tmp_path / kind, dtype="bfloat16")
        sizes[kind] = (tmp_path / kind / "model.safetensors").stat().st_size
    saved = projection_bytes(one) // 2 * 7 // 16
    assert sizes["dense"] - sizes["packed"] == pytest.approx(saved, abs=8192)  # the list of tensors


def test_the_command_packs_a_pruned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.save(dense("packed_2_4"), tmp_path / "dense", dtype="float32")
    arguments = ["--model", str(tmp_path / "dense"), "--pattern", "2:4", "--out", str(tmp_path / "out")]
    assert pack_command(arguments) == 0
    assert "bytes of parameters, 0." in capsys.readouterr().out
    assert_same_parameters(models.load(tmp_path / "out", dtype="float32"), packed("packed_2_4"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["packed_keep"], config["packed_of"]) == ("jaxdual_pruned", 2, 4)
    for changed, message in (
        (arguments, "exists; a new or an empty folder"),
        (
            [*arguments[:-1], str(tmp_path / "other"), "--pattern", "1:4"],
            "layers.0.attention.q: weights don't follow 1:4",
        ),
        (
            [*arguments[:-1], str(tmp_path / "other"), "--pattern", "0.5@16"],
            "layers.0.attention.q: outputs 0 to 15 have",
        ),
        ([*arguments[:-1], str(tmp_path / "other"), "--pattern", "0.5"], "single weights anywhere have no packed form"),
        ([*arguments[:-1], str(tmp_path / "other"), "--pattern", "0.5@48"], "attention.q of layer 0: blocks of 48"),
        (["--model", str(tmp_path / "out"), *arguments[2:-1], str(tmp_path / "other")], "is packed already"),
    ):
        assert pack_command(changed) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_what_is_packed_is_neither_pruned_nor_divided() -> None:
    config = packed("packed_2_4").config
    with pytest.raises(ValueError, match="what it was made of can be pruned"):
        linears_of(config, 0)
    with pytest.raises(ValueError, match="tensor_parallel_size=2: packed weights"):
        ParallelSizes(tensor=2).check(config)
    iha = dataclasses.replace(config, packed=None, iha=models.IHAConfig(pseudo_heads=2, layers=(0,)))
    with pytest.raises(ValueError, match="has heads that are mixed"):
        packed_model(
            models.init(dataclasses.replace(iha, family="jaxdual_iha", o_bias=False, mlp_bias=False)),
            PackedConfig(keep=2, of=4),
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed_of": 3}, "pattern 2:3 can't be packed"),
        ({"packed_block": 16}, "packed_keep and packed_of are expected, or packed_block"),
        ({"packed_keep": None, "packed_of": None, "packed_block": 16}, "packed_share 0.0"),
        ({"packed_keep": None, "packed_of": None, "packed_block": 32, "packed_share": 0.5}, "of layer 0: blocks of 32"),
        ({"intermediate_size": 56, "layer_intermediate_sizes": [16, 56, 32]}, "56 inputs can't be packed"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "not known and may change the mathematics"),
        ({"packed_keep": 1}, r"tensor '.*packed_values' has shape"),
    ],
)
def test_configurations_that_do_not_fit_are_named(changed, message, tmp_path: Path) -> None:
    file = write("packed_2_4", tmp_path) / "config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(models.ModelError, match=message):
        models.load(tmp_path)


def test_masks_of_another_type_are_refused(tmp_path: Path) -> None:
    file = write("packed_2_4", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.packed_mask"
    save_file(tensors | {name: tensors[name].astype(np.int32)}, file)
    with pytest.raises(models.ModelError, match=f"tensor '{name}' has type I32; uint16 is expected"):
        models.load(tmp_path)


def test_other_families_have_no_packed_form() -> None:
    config = dataclasses.replace(packed("packed_2_4").config, family="llama", o_bias=False, qk_norm=False)
    config = dataclasses.replace(config, mlp_bias=False, layer_intermediate_sizes=())
    with pytest.raises(ValueError, match="packed is PackedConfig"):
        models.to_hf(config)
    assert models.pruned_form(config).family == "jaxdual_pruned"
    assert packed_form("0.25@64") == PackedConfig(block=64, share=0.25)
    assert PackedConfig(block=64, share=0.25).blocks_kept(704) == 9
