"""Healthy and sick runs of a small transformer, with the diagnostics that tell them apart."""
