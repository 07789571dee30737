"""Small models first, larger ones where they are needed: by the confidence of each (Chen, Chen and Yen, 2026)."""
