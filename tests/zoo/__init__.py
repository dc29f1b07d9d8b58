"""Routing on the parameter trees of models that people train."""
