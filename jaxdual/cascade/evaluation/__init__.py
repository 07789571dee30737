"""Making and judging cascades: what models make of questions, probes, thresholds, figures."""
