"""What to run within a budget: knobs, what a rank is worth, and the ranks that fit."""
