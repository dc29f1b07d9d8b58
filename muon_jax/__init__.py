"""Muon, as Moonshot AI scaled it for LLM training, as an Optax optimizer for JAX."""

__version__ = "0.1.0"
