"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input, said in one line: what is wrong (with both numbers) and what to do about it.

    Launchers print it as ``error: ...`` and exit with code 2; from Python it is a ValueError.
    """
