"""Read the role of every parameter from the program that uses it: see `by_use`."""
