"""The texts, models and arms of the study of LLM Modules (`launch.graft_study`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import graft as graft_config
from launch.esft_domains import trained_tokenizer, wikitext
from launch.graft_setup import Setup, make_setup
from launch.smollm2 import gguf_path
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.alignment import align
from moejax.data.grafting import GraftExample
from moejax.io.load import Loaded, load_any, save_any
from moejax.io.tokenizer import Tokenizer
from moejax.methods.vocabulary import prune_vocabulary
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig

UNKNOWN = "<unk>"
# How the tokenised copy writes what stood in the article.
_MARKS = ((r" @(.)@ ", r"\1"), (r" ([,.;:!?)%\]])", r"\1"), (r"([(\[$]) ", r"\1"),
          (r" ('s|n't|'re|'ve|'ll|'m|'d|s')\b", r"\1"), (r'" ([^"]*?) "', r'"\1"'))  # fmt: skip


def plain(article: str) -> str:
    """A tokenised article as running text, without headings; rare words stay `<unk>`."""
    lines = [line.strip() for line in article.split("\n")]
    text = " ".join(line for line in lines if line and not line.startswith("="))
    for pattern, with_what in _MARKS:
        text = re.sub(pattern, with_what, text)
    return re.sub(r"\s+", " ", text).strip()


def pieces(text: str, tokenizer: Tokenizer, seq_len: int) -> list[str]:
    """The text cut between words into pieces of at most seq_len tokens; a short rest is left
    out."""
    words = text.split(" ")
    encoded = tokenizer.backend.encode_batch([f" {w}" for w in words], add_special_tokens=False)
    found: list[str] = []
    now: list[str] = []
    size = 0
    for word, tokens in zip(words, encoded, strict=True):
        if now and size + len(tokens.ids) > seq_len - 2:
            found.append(" ".join(now))
            now, size = [], 0
        now.append(word)
        size += len(tokens.ids)
    return [*found, " ".join(now)] if size > seq_len // 4 else found


def example_of(text: str, setup: Setup) -> GraftExample:
    """A text for both models; the first token and those of `<unk>` do not count, no end token."""
    joined = setup.joined
    found = align(text, joined.target, joined.source, joined.how)
    spans = [m.span() for m in re.finditer(UNKNOWN, text)]
    hidden = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    starts = [0, *found.target_ends[:-1]]
    pairs = list(zip(starts, found.target_ends, strict=True))
    counted = [not any(a < hi and lo < b for lo, hi in hidden) for a, b in pairs]
    counted[0] = False
    size = sum(b - a for (a, b), yes in zip(pairs, counted, strict=True) if yes)
    limits = found.limits
    if joined.paper:
        limits = [len(found.source_ids)] * len(limits)
    return GraftExample(found.target_ids, counted, found.source_ids, limits, size)


@dataclasses.dataclass(frozen=True)
class Lab:
    """Texts and models that all arms share.

    texts: rows that the source reads, the last `num_heldout` of them never trained on. general:
    what the targets are pre-trained on.
    """

    config: ConfigDict
    workdir: Path
    source: Loaded
    texts: list[str]
    num_heldout: int
    general: list[str]

    @classmethod
    def of(cls, config: ConfigDict, workdir: Path) -> Lab:
        """Reads the texts; InputError where there are too few."""
        source = load_any(source_name(config), "float32", abstract=True)
        assert source.tokenizer is not None
        data, folder = config.data, Path(config.data.folder)
        rows: dict[str, list[list[str]]] = {}
        for part in ("test", "valid"):
            articles = [plain(a) for a in wikitext(folder, part)]
            rows[part] = [pieces(a, source.tokenizer, data.seq_len) for a in articles if a]
        wanted = data.heldout_share * sum(map(len, rows["test"]))
        heldout: list[str] = []
        while len(heldout) < wanted and rows["test"]:
            heldout = rows["test"].pop() + heldout
        train = [text for article in rows["test"] for text in article]
        general = [text for article in rows["valid"] for text in article]
        if data.max_rows:
            train, heldout, general = (r[: data.max_rows] for r in (train, heldout, general))
            heldout = heldout[: max(4, data.max_rows // 5)]
        train, heldout = (
            [t for t in part if _fits(t, source.tokenizer, data.seq_len)]
            for part in (train, heldout)
        )
        if len(train) < config.train.batch_size or len(heldout) < 2:
            raise InputError(f"{len(train)} and {len(heldout)} texts are too few: data.folder")
        return cls(config, workdir, source, [*train, *heldout], len(heldout), general)

    def pruned(self) -> Path:
        """The source with the tokens that all texts are made of, and the ids it had for them.

        A head of 49,152 ids is most of what a target of this size computes.
        """
        folder = self.workdir / "source"
        if not folder.is_dir():
            loaded = load_any(source_name(self.config), "float32")
            cut, kept = prune_vocabulary(loaded, [*self.texts, *self.general])
            np.save(self.workdir / "kept_ids.npy", kept)
            save_any(cut, folder, "hf")
        return folder

    def target_config(self, vocab_size: int) -> ModelConfig:
        """A small Llama."""
        t = self.config.target
        return ModelConfig(
            "llama", vocab_size, t.layers, t.width, t.ffn, t.heads, t.heads, t.width // t.heads,
            max_position=4 * self.config.data.seq_len, tie_embeddings=True,
        )

    def target(self, own: bool) -> Path:
        """The folder of the pre-trained target, with the source's tokenizer or one of its own."""
        name = "own_target" if own else "target"
        folder = self.workdir / name
        if folder.is_dir():
            return folder
        source = load_any(self.pruned(), "float32", abstract=True)
        tokenizer, size = source.tokenizer, source.config.vocab_size
        assert tokenizer is not None
        if own:
            path = self.workdir / "own_tokenizer.json"
            backend = trained_tokenizer(self.general, self.config.target.own_vocab, path)
            tokenizer = Tokenizer(backend, {"eos_token": "<end>"}, (0,))
            size = tokenizer.vocab_size
        config = self.target_config(size)
        params = self._pretrained(config, tokenizer, self.workdir / f"{name}_run")
        save_any(Loaded(params, config, tokenizer), folder, "hf")
        return folder

    def _pretrained(self, config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> tree.Tree:
        p, seq_len = self.config.pretrain, self.config.data.seq_len
        ids = [tokenizer.encode(text)[:seq_len] for text in self.general]

        def batches(step: int):
            per_epoch = len(ids) // p.batch_size
            epoch, part = divmod(step, per_epoch)
            order = np.random.default_rng([5, epoch]).permutation(len(ids))
            chosen = order[part * p.batch_size :][: p.batch_size]
            return _rows([ids[i] for i in chosen], seq_len)

        optim = OptimConfig("adamw", p.lr, "cosine", p.steps // 20, 1.0, 0.1)
        result = fit(
            TrainConfig(p.steps, optim, log_every=max(1, p.steps // 10), save_every=100),
            lambda params, frozen, batch, rng: lm_loss(params, config, batch),
            transformer.init_params(config, jax.random.key(0)),
            {},
            batches,
            folder,
            None,
            RunInfo("pretrain"),
        )
        return jax.tree.map(np.asarray, result.params)

    def setup(self, arm: str, seed: int) -> Setup:
        """The two models and what is trained in one arm."""
        c = self.config
        own, paper = arm.startswith("own_"), arm.startswith("paper")
        base = graft_config.get_config()
        base.source.model = str(self.pruned())
        base.target.model = str(self.target(own))
        base.bridge.update(c.bridge.to_dict())
        base.bridge.alignment = "settled" if own else "same"
        base.bridge.placement = "paper" if paper else "inside"
        base.method = "bridge" if paper else arm.removeprefix("own_")
        length = self.own_length() if own else c.data.seq_len
        base.data.update(target_len=length, source_len=c.data.seq_len, seed=seed)
        base.train.update(c.train.to_dict())
        base.train.update(seed=seed, schedule="cosine", save_every=0,
                          log_every=max(1, c.train.steps // 5))
        base.distill.update(c.gkd.to_dict())
        base.distill.prompt = c.gkd.length // 3
        setup = make_setup(base)
        if arm == "paper_causal":  # the paper's layers, and its mask alone is another
            joined = dataclasses.replace(setup.joined, paper=False)
            setup = dataclasses.replace(setup, joined=joined)
        return setup

    def own_length(self) -> int:
        """The longest text in tokens of the target's own tokenizer."""
        tokenizer = load_any(self.target(True), "float32", abstract=True).tokenizer
        assert tokenizer is not None
        return max(len(e.ids) for e in tokenizer.backend.encode_batch(self.texts))

    def examples(self, setup: Setup) -> list[GraftExample]:
        """All texts for the two models of an arm; the source's tokens are the same in all."""
        return [example_of(text, setup) for text in self.texts]


def source_name(config: ConfigDict) -> str:
    """Folder or file of the source."""
    return config.source or str(gguf_path())


def _fits(text: str, tokenizer: Tokenizer, seq_len: int) -> bool:
    """Whether the text fits, and is cut into the same tokens whole and word by word.

    Then one set of the source's states serves targets with either tokenizer.
    """
    ids = tokenizer.encode(text)
    both = align(text, tokenizer, tokenizer, "settled")
    return len(ids) <= seq_len and both.source_ids == ids


def _rows(ids: Sequence[Sequence[int]], seq_len: int) -> dict[str, np.ndarray]:
    shape = (len(ids), seq_len)
    rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids")}
    rows["positions"] = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape)
    for row, found in enumerate(ids):
        rows["tokens"][row, : len(found)] = found
        rows["segment_ids"][row, : len(found)] = 1
    return rows | {"loss_mask": rows["segment_ids"] > 0}
