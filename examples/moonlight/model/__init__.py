"""The models: Moonlight, and the dense family, on one set of layers."""
