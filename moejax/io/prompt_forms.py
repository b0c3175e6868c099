"""How a model wants to be asked, beside its weights: prompt_forms.json, {"task": "form"}.

What a form is, the tasks say (`moejax.evals.tasks`); every conversion and training carries the file
along, so that a model is asked as it was when it was chosen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError
from moejax.io import atomic

FILE = "prompt_forms.json"
GGUF_KEY = "moejax.prompt_forms"


def read(folder: Path) -> dict[str, str]:
    """The forms that a model's folder names, empty where it names none."""
    path = folder / FILE
    return checked(atomic.read_json(path), path) if path.is_file() else {}


def checked(found: Any, place: Path) -> dict[str, str]:
    """`found` if it is an object of task and form; InputError else."""
    if not isinstance(found, dict) or not all(isinstance(form, str) for form in found.values()):
        raise InputError(f'{place}: an object of task and form is needed, as {{"gsm8k": "chat"}}')
    return found


def write(folder: Path, forms: dict[str, str]) -> None:
    """Writes the file, unless there is nothing to say."""
    if forms:
        atomic.write_json(folder / FILE, forms)


def of(path: Path) -> dict[str, str]:
    """The forms of a model folder or GGUF file, its weights unread."""
    if path.is_dir():
        return read(path)
    if path.suffix != ".gguf" or not path.is_file():
        return {}
    from moejax.io.gguf import read_metadata  # the gguf package takes a while to import

    return from_gguf(read_metadata(path), path)


def from_gguf(metadata: Any, path: Path) -> dict[str, str]:
    """The forms that a GGUF file's metadata name."""
    return checked(json.loads(metadata.get(GGUF_KEY, "{}")), path)
