"""What a model can do: held-out loss, tasks whose answers are run, and honest intervals."""
