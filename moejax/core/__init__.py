"""What every other part stands on: trees, numeric types, errors."""
