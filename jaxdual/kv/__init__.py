"""KV memory: layouts, pages, prefix tree, tiers."""
