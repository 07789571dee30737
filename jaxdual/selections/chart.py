"""Small charts of a figure by step, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

_HEIGHT = 40.0


def chart(values: Sequence[float | None], most: float, label: str) -> Markup:
    """A line that stays on each step's value for one unit of width; with a gap for None.

    Args:
      values: of the steps; at least one.
      most: the value at the top; 0 is at the bottom.
      label: what it shows, for those who don't see it.
    """
    path, open_line = "", False
    for number, value in enumerate(values):
        if value is None:
            open_line = False
            continue
        height = _HEIGHT * (1 - (min(value / most, 1.0) if most else 0.0))
        path += f"V{height:.1f}H{number + 1}" if open_line else f"M{number} {height:.1f}H{number + 1}"
        open_line = True
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 -2 {} {:.0f}" preserveAspectRatio="none">'
        '<rect class="cursor" x="0" y="-2" width="1" height="{:.0f}"/><path d="{}"/></svg>'
    ).format(label, len(values), _HEIGHT + 4, _HEIGHT + 4, path)
