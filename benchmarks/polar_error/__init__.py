"""What Newton-Schulz costs, and how far its result is from the polar factor."""
