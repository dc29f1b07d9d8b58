"""Programs built on muon_jax."""
