"""What ShadowLLM is collected, trained and judged on: prompts with what follows them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from launch.smollm2 import gguf_path
from moejax.core.errors import InputError
from moejax.data.sources import rows
from moejax.data.stdlib import load_corpus
from moejax.evals.masked import Pair
from moejax.evals.tasks.choice import CHOICE_TASKS, ChoiceItem, load_choices
from moejax.evals.text_likelihood import Encoding
from moejax.io import lineage
from moejax.io.load import Loaded, load_any
from moejax.io.tokenizer import Tokenizer
from moejax.methods import shadow_traces
from moejax.methods.shadow_mask import Sizes, sizes_of
from moejax.methods.shadow_measure import Text
from moejax.train.folder import claim_folder

SOURCES = ("gsm8k", "stdlib", "wikitext")
TEXTS = "texts_sha256"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in hand, its hash, and the units of its masks."""

    loaded: Loaded
    sha256: str
    sizes: Sizes

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which `load_model` has made sure of."""
        assert self.loaded.tokenizer is not None
        return self.loaded.tokenizer


def load_model(config: ConfigDict) -> Model:
    """The model of a config on the device, in float32, perhaps its first layers only."""
    source = config.model.source or gguf_path()
    loaded = load_any(source, "float32")
    if loaded.tokenizer is None:
        raise InputError(f"{source} has no tokenizer: give a model with one")
    if config.model.layers:
        loaded = _first_layers(loaded, config.model.layers)
    sha256 = lineage.hash_params(loaded.params)
    mask = config.mask
    sizes = sizes_of(loaded.config, mask.block, mask.unit, mask.first)
    loaded = dataclasses.replace(loaded, params=jax.device_put(loaded.params))
    return Model(loaded, sha256, sizes)


def _first_layers(loaded: Loaded, count: int) -> Loaded:
    if len(loaded.config.runs) > 1 or not 0 < count <= loaded.config.num_layers:
        raise InputError(
            f"model.layers {count}: between 1 and {loaded.config.num_layers}, of a model whose "
            "layers are alike"
        )
    layers = {"0": jax.tree.map(lambda w: w[:count], loaded.params["layers"]["0"])}
    config = dataclasses.replace(loaded.config, num_layers=count)
    return dataclasses.replace(loaded, params=loaded.params | {"layers": layers}, config=config)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text to collect on: where it is from, and whether predictors never see it."""

    source: str
    text: Text
    heldout: bool


def load_samples(config: ConfigDict, tokenizer: Tokenizer) -> list[Sample]:
    """The texts of all sources, mixed in a fixed order.

    A question and its answer, a function's description and its body, and stretches of WikiText of
    which a random part is the prompt. The last texts of each source are held out: stretches that
    lie beside each other stay on one side.
    """
    data, found = config.data, []
    draw = np.random.default_rng(data.seed)
    for name, wanted in data.texts.items():
        if name not in SOURCES:
            raise InputError(f"data.texts.{name} is unknown: use {', '.join(SOURCES)}")
        texts = list(itertools.islice(_texts(name, config, tokenizer, draw), wanted))
        if len(texts) < wanted:
            raise InputError(f"data.texts.{name} asks for {wanted} texts, there are {len(texts)}")
        first = wanted - round(data.heldout_share * wanted)
        found += [Sample(name, text, at >= first) for at, text in enumerate(texts)]
    order = np.random.default_rng([data.seed, 1]).permutation(len(found))
    return [found[at] for at in order]


def _texts(name: str, config: ConfigDict, tokenizer: Tokenizer, draw) -> Iterator[Text]:
    slots, most = config.data.slots, config.data.prompt
    if name == "wikitext":
        path = Path(config.data.folder) / "wikitext2_valid.tokens.txt"
        ids = tokenizer.encode(_read(path))
        for start in range(0, len(ids) - slots, slots):
            size = int(draw.integers(max(2, most // 4), most + 1))
            yield _text(ids[start : start + slots][: 2 * size], size)
        return
    for prompt, answer in _pairs(name, config):
        before = tokenizer.encode(prompt)[-most:]
        after = tokenizer.encode(answer)[: slots - len(before)]
        if after:
            yield _text(before + after, len(before))


def _pairs(name: str, config: ConfigDict) -> Iterator[tuple[str, str]]:
    if name == "stdlib":
        for pair in load_corpus().train:
            yield f"Question: {pair.prompt}\nAnswer:", f" {pair.answer}"
        return
    for _, row in rows(str(Path(config.data.folder) / "gsm8k_train.jsonl")):
        yield f"Question: {row['question']}\nAnswer:", f" {row['answer']}"


def _text(ids: list[int], prompt: int) -> Text:
    tokens = np.array(ids, np.int32)
    return Text(tokens, np.arange(len(tokens)) >= prompt, prompt)


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is missing: name its folder with --config.data.folder")
    return path.read_text("utf-8")


def load_windows(config: ConfigDict, tokenizer: Tokenizer) -> list[Text]:
    """Disjoint stretches of WikiText-2 test, spread evenly, of which the prompt is not scored."""
    judged = config.evaluate
    if not 0 < judged.window_prompt < judged.window:
        raise InputError(
            f"evaluate.window_prompt {judged.window_prompt} leaves nothing of a window of "
            f"{judged.window}"
        )
    ids = tokenizer.encode(_read(Path(config.data.folder) / "wikitext2_test.tokens.txt"))
    there = len(ids) // judged.window
    if there < judged.windows:
        raise InputError(f"evaluate.windows {judged.windows}: the text holds {there}")
    starts = np.linspace(0, there - 1, judged.windows).astype(int) * judged.window
    return [_text(ids[s : s + judged.window], judged.window_prompt) for s in starts]


def load_items(config: ConfigDict, name: str) -> list[ChoiceItem]:
    """A task's first items, which are the same for every method."""
    if name not in CHOICE_TASKS:
        raise InputError(f"evaluate.tasks: {name!r} is unknown: use {', '.join(CHOICE_TASKS)}")
    path = Path(config.data.folder) / f"{name}.jsonl"
    return load_choices(CHOICE_TASKS[name], str(path), config.evaluate.questions)


def encoding(model: Model) -> Encoding:
    """How items become tokens."""
    return Encoding(model.tokenizer, model.loaded.config.max_position)


def identity(config: ConfigDict, sections: tuple[str, ...], model: Model) -> dict[str, Any]:
    """What a stage's folder belongs to: these sections of the config, the model, the format."""
    plain = json.loads(json.dumps(config.to_dict()))
    about = {"model_sha256": model.sha256, "traces_format": shadow_traces.FORMAT}
    return {name: plain[name] for name in sections} | about


def claim(folder: Path, name: str, mine: dict[str, Any], samples: Iterable[Sample]) -> None:
    """`claim_folder` of collected texts too: the standard library is another in another Python."""
    texts = {TEXTS: hash_pairs(pairs_of(sample.text for sample in samples))}
    claim_folder(folder, mine | texts, name, before={TEXTS: None, "traces_format": 1})


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """sha256 of token ids and of where prompts end."""
    ids = json.dumps([[list(map(int, part)) for part in pair] for pair in pairs])
    return hashlib.sha256(ids.encode()).hexdigest()


def pairs_of(texts: Iterable[Text]) -> list[Pair]:
    """(prompt, what follows it) of texts."""
    return [(t.tokens[: t.prompt].tolist(), t.tokens[t.prompt :].tolist()) for t in texts]


def check_counts(config: ConfigDict) -> None:
    """InputError for a number that leaves nothing to do, before any stage begins."""
    least = {
        "data": ("slots", "prompt"),
        "collect": ("part", "rows"),
        "train": (
            *("epochs", "token_epochs", "batch_size"),
            *("dejavu_hidden", "dejavu_epochs", "dejavu_batch"),
        ),
        "evaluate": ("windows", "questions", "batch_tokens", "calibration_texts"),
    }
    for section, names in least.items():
        for name in names:
            if config[section][name] < 1:
                raise InputError(f"{section}.{name} {config[section][name]}: give at least 1")
    if len(equal := config.train.dejavu_equal_epochs) != 2 or min(equal) < 1:
        raise InputError(f"train.dejavu_equal_epochs {equal}: of heads and of neurons, at least 1")
    if not 2 <= config.data.prompt < config.data.slots:
        raise InputError(
            f"data.prompt {config.data.prompt} of data.slots {config.data.slots}: a prompt is of 2 "
            "tokens at least, and tokens after it are scored, so give it fewer than all slots"
        )
    if not 0 < config.data.heldout_share < 1:
        raise InputError(f"data.heldout_share {config.data.heldout_share:g} lies outside (0, 1)")
