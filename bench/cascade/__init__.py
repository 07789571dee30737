"""What a cascade of the two quiz models saves, and what it loses."""
