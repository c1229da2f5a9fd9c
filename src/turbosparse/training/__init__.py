"""Training: recipe, data, trainer, checkpoints, plan.

Imports `hf` and `base`. Only the verbs may import it.
"""
