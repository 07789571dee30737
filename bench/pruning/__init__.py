"""What pruning costs in quality, and what it brings in speed and bytes."""
