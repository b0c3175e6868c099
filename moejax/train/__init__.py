"""The training engine: loss, optimizers, a jitted step, a loop that resumes, and its records."""
