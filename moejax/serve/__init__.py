"""Text out of a model: sampling and cached generation."""
