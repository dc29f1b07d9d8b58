"""A model planned for a mesh without loading it: `python -m muon_jax report`."""
