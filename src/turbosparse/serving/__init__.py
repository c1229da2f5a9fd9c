"""The server: requests join and leave the batch of an engine between two steps.

Imports nothing by itself; the extra `serve` has what its modules need.
"""
