"""What some heads of a decode step look at, as probabilities of each key."""

from pallas_kernels.retrieval_scores.api import retrieval_scores

__all__ = ["retrieval_scores"]
