"""How a model is computed: devices, blocks, and tokens sent to experts."""
