"""Predictors: made for a model, applied to it, and measured.

May import `base`, `hf` and `ops`.
"""
