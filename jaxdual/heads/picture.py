"""A picture of heads' scores by layer."""

from __future__ import annotations

from pathlib import Path

from jaxdual.heads.detection import SCORES, Detection, Score

_TITLES: dict[Score, str] = {"sum": "calibrated attention to the answer", "ndcg10": "nDCG@10"}


def draw(detection: Detection, rank_by: Score, top: int, path: Path) -> None:
    """Draws both scores of each head, and rings around the best ones. See `result_files.check_picture`.

    Args:
      detection: what is drawn.
      rank_by: the score that heads are ranked by.
      top: how many have rings.
      path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SCORES), figsize=(5.5 * len(SCORES), 5), layout="constrained")
    best = detection.ranking(rank_by)[:top]
    for score, one in zip(SCORES, axes, strict=True):
        image = one.imshow(detection.mean(score), cmap="viridis", aspect="auto", interpolation="nearest")
        one.plot([head for _, head in best], [layer for layer, _ in best], "o", mfc="none", mec="tab:red")
        one.set(title=_TITLES[score], xlabel="head", ylabel="layer")
        for axis in (one.xaxis, one.yaxis):
            axis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=one)
    figure.savefig(path, dpi=100)
    plt.close(figure)
