"""A notebook that trains a small Moonlight wherever it is opened, and what keeps it clean."""
