"""What a plan costs, and what a budget leaves of it."""
