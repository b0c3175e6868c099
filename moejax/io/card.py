"""The model card and the licence that go with every folder that is written."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from moejax.core import tree
from moejax.io import atomic
from moejax.io.loaded import License, Loaded

_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_LICENSE_LINE = re.compile(r"^license:\s*['\"]?([\w.-]+)", re.MULTILINE)
APACHE = "apache-2.0"


def named_license(name: str | None) -> License:
    """A licence known by its name only; the text is added where moejax ships it (Apache-2.0)."""
    if name is not None and name.lower() == APACHE:
        text = (resources.files("moejax.io") / "apache-2.0.txt").read_text(encoding="utf-8")
        return License(APACHE, text)
    return License(name)


def read_license(folder: Path) -> License:
    """The licence of a model folder: its LICENSE file and the name in its model card."""
    name = None
    if (folder / "README.md").exists():
        front = _FRONT_MATTER.match((folder / "README.md").read_text("utf-8", errors="replace"))
        found = _LICENSE_LINE.search(front[1]) if front else None
        name = found[1] if found else None
    for file in _LICENSE_FILES:
        if (folder / file).is_file():
            return License(name, (folder / file).read_text("utf-8", errors="replace"))
    return named_license(name)


def write_license(folder: Path, license: License) -> None:
    """Writes LICENSE when the text is known."""
    if license.text is not None:
        atomic.write_text(folder / "LICENSE", license.text)


def model_card(loaded: Loaded, name: str, dtype: str) -> str:
    """README.md of an exported folder: metadata that the hub reads, sizes, and the lineage."""
    config = loaded.config
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if loaded.license.name:
        front.append(f"license: {loaded.license.name}")
    front += ["tags:", "- moejax", "---"]
    licence = loaded.license.name or "not stated by the source"
    body = [
        f"# {_title(loaded) or name}",
        "",
        f"Written by moejax (version {_version_of(loaded)}).",
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {config.family} |",
        f"| parameters | {tree.num_params(loaded.params):,} |",
        f"| layers, width, ffn | {config.num_layers}, {config.d_model}, {config.d_ff} |",
        f"| heads, key-value heads | {config.num_heads}, {config.num_kv_heads} |",
        f"| vocabulary | {config.vocab_size:,} |",
        f"| dtype | {dtype} |",
        f"| licence of the source's weights | {licence} |",
        "",
        "## Lineage",
        "",
        "What was done, first to last (all of it, with hashes and times, in `lineage.json`):",
        "",
    ]
    return "\n".join([*front, "", *body, *_operations(loaded), ""])


def _title(loaded: Loaded) -> str:
    """Where the model comes from and what was done to it; empty when nothing is recorded."""
    sources = [Path(i["path"]).name for entry in loaded.lineage for i in entry["inputs"]]
    done = [entry["op"] for entry in loaded.lineage if entry["op"] not in ("import", "export")]
    return ": ".join([sources[0], *([", ".join(done)] if done else [])]) if sources else ""


def _operations(loaded: Loaded) -> list[str]:
    lines = []
    for number, entry in enumerate(loaded.lineage, start=1):
        inputs = ", ".join(f"`{Path(i['path']).name}`" for i in entry["inputs"])
        args = json.dumps(entry["args"], ensure_ascii=False)
        lines.append(f"{number}. **{entry['op']}**{' of ' + inputs if inputs else ''}: `{args}`")
    return lines or ["1. nothing recorded"]


def _version_of(loaded: Loaded) -> str:
    return loaded.lineage[-1]["moejax"] if loaded.lineage else ""
