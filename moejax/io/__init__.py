"""Models on disk: Hugging Face folders, GGUF files, our own format, checkpoints, lineage."""
