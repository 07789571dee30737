"""Operations of training a decoder, counted by part; a multiply-add is two.

Per token of a sequence of `length` tokens, forward:

    projections  2 D (H d + 2 Hkv d) + 2 H d D
    mixing       2 H P d (H + 2 Hkv), and 2 H P d H for a global collapse or 2 H P d for one of each head
    attention    4 H d times the keys that a (pseudo) query sees, summed over the P queries of a token
    feed-forward 6 D F
    head         2 D V

Training takes three times as many: gradients need two products for each one. Norms, rotations, softmax, the embedding's
look-up and the optimiser are left out; the optimiser's work is the same in each step of all arms.

Attention is counted in two ways: by the pairs that the mask lets through, which is what arms are matched by; and as
executed, with all pairs of the blocks of `models.training.attention` and four passes, as it computes scores again.
"""

from __future__ import annotations

from models import ModelConfig
from models.iha_costs import attention_flops, mixing_flops
from models.training.attention import block_of, seen


def forward(config: ModelConfig, length: int) -> dict[str, float]:
    """Operations of one token by part, forward, averaged over a sequence."""
    heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    layers = config.num_layers
    return {
        "projections": layers * (2 * hidden * (heads + 2 * kv_heads) + 2 * heads * hidden) * head_dim,
        "mixing": mixing_flops(config),
        "attention": attention_flops(config, length) / length,
        "feed_forward": 6 * hidden * sum(map(config.intermediate_size_of, range(layers))),
        "head": 2 * hidden * config.vocab_size,
    }


def executed_pairs(config: ModelConfig, layer: int, length: int) -> int:
    """Pairs of (pseudo) query and key that one head of a layer computes over a sequence, with those that are masked."""
    window, count, span = config.window_of(layer), 1, 1
    if config.iha is not None and config.has_iha(layer):
        count = config.iha.pseudo_heads
        if config.iha.mask == "flat":
            window = None if window is None else window * count
        else:
            span = count
    positions = length * count
    block = block_of(positions)
    total = 0
    for start in range(0, positions, block):
        stop = min(start + block, positions)
        first, end = seen(start, stop, window, span)
        total += (stop - start) * (end - first)
    return total


def training(config: ModelConfig, length: int) -> float:
    """Operations of training on one token, averaged over a sequence."""
    return 3 * sum(forward(config, length).values())


def training_executed(config: ModelConfig, length: int) -> float:
    """`training` with attention as the trainer's blocks compute it."""
    parts = forward(config, length)
    one = 4 * config.num_heads * config.head_dim / length
    blocks = sum(one * executed_pairs(config, layer, length) for layer in range(config.num_layers))
    return 3 * (sum(parts.values()) - parts["attention"]) + 4 * blocks
