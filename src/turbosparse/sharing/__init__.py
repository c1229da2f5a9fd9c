"""The card of a model that is published: what was measured of it, in words, tables and a plot.

Imports `training`, `packed`, `ops`, `hf` and `base`. The verbs may import it.
"""
