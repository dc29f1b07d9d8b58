"""Measurements of muon_jax against its peers."""
