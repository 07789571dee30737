"""Reading generation_config.json."""

import json
import shutil
from pathlib import Path

import pytest

from models import GenerationConfig, ModelError, load_generation_config

LLAMA = Path(__file__).parent.parent / "fixtures" / "hf" / "llama3_rope"


def read(folder: Path, values: dict | None) -> GenerationConfig:
    shutil.copyfile(LLAMA / "config.json", folder / "config.json")
    if values is not None:
        (folder / "generation_config.json").write_text(json.dumps(values))
    return load_generation_config(folder)


def test_all_values(tmp_path: Path) -> None:
    values = {
        "eos_token_id": [5, 6],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0,
        "repetition_penalty": 1.05,
        "max_new_tokens": 100,
        "transformers_version": "5.0",
    }
    assert read(tmp_path, values) == GenerationConfig(
        eos_token_ids=(5, 6),
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=0.0,
        repetition_penalty=1.05,
        max_new_tokens=100,
    )


def test_end_tokens_come_from_the_model_where_the_file_names_none(tmp_path: Path) -> None:
    assert read(tmp_path, None) == GenerationConfig(eos_token_ids=(2,))
    assert read(tmp_path, {}) == GenerationConfig(eos_token_ids=(2,))
    assert read(tmp_path, {"eos_token_id": 7}) == GenerationConfig(eos_token_ids=(7,))


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_that_is_off_is_none(tmp_path: Path, off: int | None) -> None:
    assert read(tmp_path, {"top_k": off}).top_k is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0; it must be at least 0"),
        ({"temperature": "hot"}, "'temperature' is 'hot'"),
        ({"top_p": 0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_k": 2.5}, "'top_k' is 2.5"),
        ({"min_p": 2}, "min_p is 2.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"eos_token_id": [-2]}, "eos_token_id is"),
        ({"eos_token_id": {"a": 1}}, "'eos_token_id'"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        read(tmp_path, values)
    assert "generation_config.json" in str(error.value)
