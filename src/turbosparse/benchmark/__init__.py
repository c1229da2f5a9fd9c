"""Measuring speed: the harness that every benchmark shares, and the engines to compare with.

Imports `engine` and what lies below. Only the verbs may import it.
"""
