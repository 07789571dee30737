"""Seeded loads are the same for everybody who asks, and stay in their bounds."""

from bench.workload import mixed_load, prompts


def test_prompts_have_their_length_and_depend_on_the_seed_only():
    first = prompts(3, 5, 100, seed=1)
    assert first == prompts(3, 5, 100, seed=1) != prompts(3, 5, 100, seed=2)
    assert [len(prompt) for prompt in first] == [5, 5, 5]
    assert all(0 <= token < 100 for prompt in first for token in prompt)


def test_mixed_load_arrives_in_order_within_its_time():
    items = mixed_load(64, 4096, seed=0, arrive_within=2.0)
    arrivals = [item.arrival for item in items]
    assert arrivals == sorted(arrivals)
    assert (arrivals[0], round(arrivals[-1], 9)) == (0.0, 2.0)


def test_mixed_load_lengths_are_log_uniform_and_do_not_depend_on_arrivals():
    items = mixed_load(400, 4096, seed=0, arrive_within=2.0)
    lengths = [len(item.prompt) for item in items]
    assert 16 <= min(lengths) < 20
    assert 420 < max(lengths) <= 512
    assert all(8 <= item.output <= 256 for item in items)
    # Log-uniform: as many below the geometric mean, sqrt(16 * 512), as above it; evenly spread lengths would give 15 %.
    assert 0.42 < sum(length < 90 for length in lengths) / 400 < 0.58
    assert [len(item.prompt) for item in mixed_load(400, 4096, seed=0)] == lengths


def test_one_request_arrives_at_once():
    (item,) = mixed_load(1, 4096, seed=0, arrive_within=2.0)
    assert item.arrival == 0.0
