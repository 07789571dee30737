"""What `LLM` and `AsyncLLM` tell alike of the model that they serve."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxdual.decoding.dysco import DyscoModel
from jaxdual.front import Front, TokenEngine
from jaxdual.outputs import EngineInfo
from jaxdual.sampling_params import SamplingParams
from jaxdual.tokenizer import Tokenizer


class ServedModel(ABC):
    """A model behind a front."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """What is served: model, sizes, number type."""

    @property
    @abstractmethod
    def _front(self) -> Front: ...

    @property
    def served_model_name(self) -> str:
        """The model's name in responses."""
        return self.info.served_model_name

    @property
    def system_fingerprint(self) -> str:
        """Identifies weights and number type, in the form of OpenAI's `system_fingerprint`."""
        return self.info.system_fingerprint

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.info.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          TokenizerError: the model folder has none.
        """
        return self._front.text_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters that the model's `generation_config.json` recommends, `SamplingParams()` where it is silent."""
        return SamplingParams(**self.info.default_sampling)  # type: ignore[arg-type]


def dysco_model(info: EngineInfo) -> DyscoModel:
    """What requests that are decoded by DySCO can ask of an engine."""
    return DyscoModel(
        info.served_model_name,
        info.num_layers,
        info.num_heads,
        info.dysco_refusal,
        info.dysco_profile,
        info.fingerprint,
        info.dysco_only_compiled,
    )


def front_of(engine: TokenEngine, info: EngineInfo) -> Front:
    """The front of an engine, with the tokenizer of its model's folder.

    Raises:
      TokenizerError: the tokenizer's files can't be used.
    """
    return Front(
        engine,
        Tokenizer.find(info.model_folder),
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        dysco=dysco_model(info),
        gate_refusal=info.gate_refusal,
        has_probe=info.has_probe,
    )
