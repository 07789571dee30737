"""What `generation_config.json` says about ending and sampling."""

from dataclasses import dataclass
from pathlib import Path

from models.config_reader import ConfigReader, read_json
from models.errors import ModelError
from models.families import load_config


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """A model's own defaults for a request that does not set them; None where the model has no opinion.

    Args:
      eos_token_ids: every token that ends a text.
      temperature: at least 0; 0 is greedy.
      top_p: above 0, at most 1.
      top_k: at least 1; a file's 0 or -1 (off) is None.
      min_p: 0 to 1.
      repetition_penalty: above 0.
      max_new_tokens: at least 1.

    Raises:
      ValueError: a field outside its range.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, fits, accepted in (
            ("temperature", self.temperature is None or self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1 (0 or -1: off)"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("eos_token_id", all(token >= 0 for token in self.eos_token_ids), "at least 0"),
        ):
            if not fits:
                value = getattr(self, "eos_token_ids" if name == "eos_token_id" else name)
                raise ValueError(f"{name} is {value!r}; it must be {accepted}")


def load_generation_config(folder: str | Path) -> GenerationConfig:
    """Read `generation_config.json` of a checkpoint folder, if there is one.

    End-of-sequence ids come from this file if it names any, otherwise from `config.json`, as in transformers. Sampling
    values that are set apply whether or not `do_sample` is set, as in vLLM: they are how the authors mean the model to
    be sampled, and a greedy request says so itself. Other keys are not read.

    Raises:
      ModelError: a malformed file, a value of the wrong type or out of range; the message names file and key.
    """
    file = Path(folder) / "generation_config.json"
    if not file.exists():
        return GenerationConfig(eos_token_ids=load_config(folder).eos_token_ids)
    reader = ConfigReader(read_json(file), file)
    top_k = _optional_integer(reader, "top_k")
    try:
        return GenerationConfig(
            eos_token_ids=reader.integers("eos_token_id") or load_config(folder).eos_token_ids,
            temperature=_optional_number(reader, "temperature"),
            top_p=_optional_number(reader, "top_p"),
            top_k=None if top_k in (0, -1) else top_k,
            min_p=_optional_number(reader, "min_p"),
            repetition_penalty=_optional_number(reader, "repetition_penalty"),
            max_new_tokens=_optional_integer(reader, "max_new_tokens"),
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from None


def _optional_number(reader: ConfigReader, key: str) -> float | None:
    return reader.number(key) if reader.has(key) else None


def _optional_integer(reader: ConfigReader, key: str) -> int | None:
    return reader.integer(key) if reader.has(key) else None
