"""Pure functions on arrays: no Flax, no mesh, no parameters of a model."""
