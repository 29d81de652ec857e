"""Sampling from a trained backbone and scoring what comes out."""
