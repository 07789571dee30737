"""All tasks, and how large an item must be to have a length."""

from __future__ import annotations

from collections.abc import Callable

from bench.longcontext import mrcr, needle, path_walking
from bench.longcontext.items import Form, Item, Task

TASKS = {task.name: task for task in (*needle.TASKS, *path_walking.TASKS, *mrcr.TASKS)}


def fit(
    task: Task, length: int, count: int, form: Form, seed: int, tokens: Callable[[Item], int]
) -> tuple[int, list[Item]]:
    """Items of the largest size at which no prompt is longer than `length`, and that size.

    Args:
      task: whose items.
      length: of prompts, in tokens.
      count: of items.
      form, seed: of items.
      tokens: length of an item's prompt.

    Raises:
      ValueError: even the smallest items are longer, or there are none so large in this form.
    """

    def longest(size: int, among: int) -> int:
        return max(tokens(item) for item in task.items(among, size, form, seed))

    if longest(task.smallest, 1) > length:
        raise ValueError(f"{task.name}: length={length} must be at least {longest(task.smallest, 1)} tokens")
    largest = task.largest(form)
    low, high = task.smallest, 2 * task.smallest
    while (largest is None or high <= largest) and longest(high, 1) <= length:
        low, high = high, 2 * high
    if largest is not None and high > largest:
        if longest(largest, 1) <= length:
            raise ValueError(
                f"{task.name}: length={length} must be below {longest(largest, 1) + 1} tokens in the form {form!r}"
            )
        high = largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if longest(middle, 1) <= length else (low, middle)
    # The first item tells how large they are, about; others may be longer.
    while low > task.smallest and longest(low, count) > length:
        low -= max(1, low // 100)
    return low, task.items(count, low, form, seed)
