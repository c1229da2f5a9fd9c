"""Everything that knows Hugging Face: our model classes, checkpoint names, loading and export."""
