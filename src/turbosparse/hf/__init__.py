"""Everything that knows Hugging Face: families, checkpoints, model classes, loading, surgery.

Imports `base`. Anything above may import it.
"""
