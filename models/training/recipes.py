"""The models that ship: their sizes, and how each is trained."""

from dataclasses import dataclass

from models import ModelConfig, MoEConfig
from models.training.quiz import VOCAB_SIZE as QUIZ_VOCAB_SIZE
from models.training.quiz import WINDOW as QUIZ_WINDOW
from models.training.retrieval import VOCAB_SIZE as RETRIEVAL_VOCAB_SIZE
from models.training.tokenizer import MAX_LENGTH, VOCAB_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one model is trained; all fractions are of the budget (CPU time, or steps).

    Attributes:
        tokens_per_step: tokens of a step, at either length.
        length: tokens of a window.
        long_length: tokens of a window at the end of the run.
        long_fraction: share of the budget that trains on ``long_length``.
        peak_rate: highest learning rate. Updates have about the root mean square that AdamW's have.
        adam_rate: learning rate of embedding and norms, as a multiple of that of the matrices.
        mixing_rate: that of the mixing and collapse weights of Interleaved Head Attention, as such a multiple; at the
            highest rate of 1e-2 they have 0.02.
        warmup_steps: steps of linear warm-up.
        decay_from: fraction at which the learning rate starts to fall linearly, to zero at the end.
        weight_decay: decoupled weight decay of the matrices inside the layers.
        clip_norm: largest global norm of a gradient.
        z_loss: weight of the mean squared log-partition, which keeps logits from drifting.
        balance: weight of the router's load-balancing loss (mixture of experts only).
        seed: of initial weights and data order.
    """

    tokens_per_step: int = 2048
    length: int = 256
    long_length: int = MAX_LENGTH
    long_fraction: float = 0.12
    peak_rate: float = 8e-3
    adam_rate: float = 1.0
    mixing_rate: float = 2.0
    warmup_steps: int = 30
    decay_from: float = 0.3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    z_loss: float = 1e-4
    balance: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for length in (self.length, self.long_length):
            if length < 1 or self.tokens_per_step % length:
                raise ValueError(f"length {length}: must divide tokens_per_step={self.tokens_per_step}")
        for name in ("long_fraction", "decay_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")


def _qwen3(**sizes: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        qk_norm=True,
        # <|im_end|> ends a turn, <|endoftext|> a file.
        eos_token_ids=(VOCAB_SIZE - 1, VOCAB_SIZE - 3),
        **sizes,  # type: ignore[arg-type]
    )


CONFIGS = {
    "small": _qwen3(
        family="qwen3", hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32
    ),
    "base": _qwen3(
        family="qwen3", hidden_size=256, intermediate_size=704, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64
    ),
    "moe": _qwen3(
        family="qwen3_moe",
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        moe=MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=160, norm_topk_prob=True),
    ),
}

RECIPES = {"small": Recipe(peak_rate=1e-2), "base": Recipe(), "moe": Recipe()}

RETRIEVAL_CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=RETRIEVAL_VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    # Eight times what it is trained on, so that longer prompts are served.
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    qk_norm=True,
    eos_token_ids=(RETRIEVAL_VOCAB_SIZE - 1, RETRIEVAL_VOCAB_SIZE - 3),
)
RETRIEVAL_RECIPE = Recipe(long_length=512, long_fraction=0.5, peak_rate=5e-3, adam_rate=0.5)


def _quiz(**sizes: int) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=QUIZ_VOCAB_SIZE,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        qk_norm=True,
        eos_token_ids=(QUIZ_VOCAB_SIZE - 1, QUIZ_VOCAB_SIZE - 3),
        **sizes,  # type: ignore[arg-type]
    )


QUIZ_CONFIGS = {
    "small": _quiz(hidden_size=16, intermediate_size=24, num_layers=4, num_heads=1, num_kv_heads=1),
    "large": _quiz(hidden_size=64, intermediate_size=192, num_layers=4, num_heads=4, num_kv_heads=2),
}
_QUIZ_ROWS = 256
_QUIZ_RECIPE = Recipe(
    tokens_per_step=_QUIZ_ROWS * QUIZ_WINDOW, length=QUIZ_WINDOW, long_length=QUIZ_WINDOW, long_fraction=0.0
)
QUIZ_RECIPES = {"small": _QUIZ_RECIPE, "large": _QUIZ_RECIPE}
# The small one is to know between half and three quarters of what it is asked.
QUIZ_STEPS = {"small": 1020, "large": 3000}
