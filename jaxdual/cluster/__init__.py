"""Engines that serve one model together: some compute prompts, others go on from them."""
