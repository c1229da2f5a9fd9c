"""Running packed models: decoders, sequences, sampling, and what a step costs.

Imports `packed`, `ops`, `hf` and `base`. The verbs and `benchmark` may import it.
"""
