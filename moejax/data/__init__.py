"""From text to batches: sources, conversations with a loss mask, packed rows, a loader."""
