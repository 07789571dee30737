"""Sparsity Induction (Jiang et al. 2026): scales of inputs, learned before a layer is pruned."""
