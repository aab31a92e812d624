"""Everything Hugging Face: the only place that imports transformers."""
