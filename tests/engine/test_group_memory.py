"""How KV memory is split between layer groups."""

import pytest

from jaxdual import LLM
from jaxdual.config import ConfigError
from jaxdual.kv.manager import GroupPages
from tests.engine.models import folder
from tests.windowed_models import WINDOW

LAYER_BLOCK = 2 * 8 * 2 * 16 * 4  # K and V, tokens, heads, head_dim, bytes
# One sequence: 20 pages under full attention, and behind the window those that 19 + 24 tokens touch.
FULL, BEHIND = 20, 7
SEQUENCE_BYTES = (FULL + 2 * BEHIND) * LAYER_BLOCK  # one layer of three attends to everything


def memory_of(name: str, **settings: object) -> tuple[GroupPages, ...]:
    llm = LLM(folder(name), block_size=8, max_model_len=160, max_num_batched_tokens=24, max_num_seqs=4, **settings)
    return tuple(group.memory for group in llm._engine.ranks[0].kv.groups)


def test_bytes_are_split_so_that_the_same_number_of_sequences_fits_everywhere() -> None:
    memory = memory_of("mistral_mixed", kv_cache_memory_bytes=3 * SEQUENCE_BYTES, host_cache_bytes=2 * SEQUENCE_BYTES)
    assert memory == (GroupPages(3 * FULL, 2 * FULL), GroupPages(3 * BEHIND, 2 * BEHIND, WINDOW))
    assert memory_of("mistral_mixed", kv_cache_memory_bytes=9 * SEQUENCE_BYTES) == (
        GroupPages(4 * FULL),
        GroupPages(4 * BEHIND, window=WINDOW),
    ), "no more than all sequences can use"


def test_num_kv_blocks_counts_pages_of_the_first_group() -> None:
    assert memory_of("mistral_mixed", num_kv_blocks=30) == (GroupPages(30), GroupPages(11, window=WINDOW))
    assert memory_of("mistral", num_kv_blocks=9) == (GroupPages(9, window=WINDOW),)
    assert memory_of("mistral_full", num_kv_blocks=30) == (GroupPages(30),)


def test_a_window_that_no_sequence_outgrows_is_full_attention() -> None:
    llm = LLM(folder("mistral_mixed"), block_size=4, max_model_len=WINDOW, max_num_seqs=4, num_kv_blocks=9)
    assert [group.memory for group in llm._engine.ranks[0].kv.groups] == [GroupPages(9)]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mistral_mixed", {"kv_cache_memory_bytes": SEQUENCE_BYTES - 1}, "gives 19 KV pages.*needs 20"),
        ("mistral", {"num_kv_blocks": BEHIND - 1}, "gives 6 KV pages.*needs 7"),
    ],
)
def test_memory_for_less_than_one_sequence_is_refused(name: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_of(name, **settings)
