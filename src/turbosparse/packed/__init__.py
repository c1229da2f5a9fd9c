"""The packed folder: its format, its statistics, and the way back to plain tensors.

Imports `ops`, `hf` and `base`. The engine and the verbs may import it.
"""
