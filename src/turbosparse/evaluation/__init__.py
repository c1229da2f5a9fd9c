"""Measuring quality: our engine in lm-evaluation-harness, tasks, and the comparison of two models.

Imports `engine` and what lies below. Only the verbs may import it. It needs the extra `eval`.
"""
