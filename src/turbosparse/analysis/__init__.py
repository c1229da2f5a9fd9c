"""What a model's feed-forwards do on text: counts, curves, and the pictures of both.

A package of its own, because the commands `analyse`, `report` and `demo` share it.
"""
