"""Text to token ids and back, with the model's own vocabulary, special tokens and chat template.

Read from a Hugging Face folder (`tokenizer.json` and what lies beside it) or from the metadata of a
GGUF file. The loss mask of a conversation comes from the same template that generation uses, so
training and inference cannot drift apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from moejax.core.errors import InputError
from moejax.io.chat_template import ChatTemplate, check_messages
from moejax.io.gguf_tokenizer import adds, backend_from_gguf
from moejax.io.sentencepiece_model import backend_of_model

# For a model without a chat template: the instruction form of the Alpaca data set, closed by EOS.
PLAIN_TEMPLATE = (
    "{% if bos_token and add_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token + '\n\n' }}"
    "{% elif message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}{% endif %}"
    "{% endfor %}"
)
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Copied as they are when a model read from a folder is written again.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

Message = Mapping[str, str]


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, its special tokens and its chat template.

    `special` maps roles (`eos_token`, ...) to token texts; `eos_ids` are all ids that end a text or
    a turn, so the ids generation should stop at; `files` are the source's own files, which `save`
    writes back byte for byte.
    """

    backend: Backend
    special: Mapping[str, str]
    eos_ids: tuple[int, ...]
    chat_template: str | None = None
    add_bos: bool = False
    model_max_length: int | None = None
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def pad_id(self) -> int:
        """The padding token, or where the model names none, an end token (pads are masked)."""
        pad = self._role_id("pad_token")
        if pad is not None:
            return pad
        return self.eos_ids[0] if self.eos_ids else 0

    def _role_id(self, role: str) -> int | None:
        text = self.special.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def check_fits(self, vocab_size: int) -> None:
        """InputError unless every id is below `vocab_size`, the model's number of embeddings."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, the model embeds only "
                f"{vocab_size} tokens; use the tokenizer that belongs to the model"
            )

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text; special tokens spelled out in it become their single id."""
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; `skip_special=False` is the inverse of `encode`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_to_text(self, token_id: int) -> str:
        """One token as text (bytes that are no whole character become U+FFFD)."""
        return self.backend.decode([int(token_id)], skip_special_tokens=False)

    # --- chat -----------------------------------------------------------------------------------

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model's template writes it (PLAIN_TEMPLATE where it has none).

        Messages are `{"role": ..., "content": ...}`; InputError where the template refuses them.
        """
        check_messages(messages)
        template = ChatTemplate.compile(self.chat_template or PLAIN_TEMPLATE)
        variables = dict(self.special)
        if self.chat_template is None:
            variables["eos_token"] = self._end_text()
            variables["add_bos"] = self.add_bos  # type: ignore[assignment]
        return template.render(messages, add_generation_prompt, variables)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the model's answer begins."""
        return self.encode(self.apply_chat(messages, add_generation_prompt=True))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation and, per id, whether the loss counts it.

        The mask covers every assistant answer with its end-of-turn token and nothing else. An
        answer's characters are those by which the template's text grows from "before it, with the
        generation prompt" to "after it". InputError where a template rewrites earlier text, or
        writes nothing that ends an answer.
        """
        text = self.apply_chat(messages)
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        ends_turn = np.isin(ids, self._turn_end_ids())
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in self._answer_spans(messages, text):
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
            closing = np.flatnonzero(inside & ends_turn)
            if not len(closing) or text[offsets[closing[-1], 1] : end].strip():
                raise InputError(
                    "the chat template writes no end-of-turn token after an answer, so a model "
                    "tuned with it would never stop; give a template that ends answers with EOS"
                )
            inside[closing[-1] + 1 :] = False
            mask |= inside
        return ids.tolist(), mask.tolist()

    def _answer_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Character ranges of the answers (with what the template writes after each)."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.apply_chat(messages[:i], add_generation_prompt=True)
            after = text if i == len(messages) - 1 else self.apply_chat(messages[: i + 1])
            if not after.startswith(before) or not text.startswith(after):
                raise InputError(
                    f"the chat template rewrites earlier text when message {i} is added, so the "
                    "answer's tokens cannot be told from the prompt's; train on single turns that "
                    "start with a user message, or give a template that only appends"
                )
            spans.append((len(before), len(after)))
        return spans

    def _stopping_at_turn_end(self) -> Tokenizer:
        """With the token that ends the template's answers among `eos_ids`.

        Some models name only the end of text in their config; generation would then run on into a
        next turn of its own making.
        """
        if self.chat_template is None:
            return self
        turn = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            ids, mask = self.encode_chat(turn)
        except InputError:  # said again, with its reason, to whoever encodes a conversation
            return self
        last = ids[int(np.flatnonzero(mask)[-1])]
        return replace(self, eos_ids=tuple(dict.fromkeys((*self.eos_ids, last))))

    def _turn_end_ids(self) -> np.ndarray:
        special = [
            i for i, token in self.backend.get_added_tokens_decoder().items() if token.special
        ]
        return np.array(sorted({*special, *self.eos_ids}), dtype=np.int64)

    def _end_text(self) -> str:
        if "eos_token" in self.special:
            return self.special["eos_token"]
        text = self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None
        if text is not None:
            return text
        raise InputError("the tokenizer names no end-of-text token; set eos_token in its config")

    # --- on disk --------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a Hugging Face folder: `tokenizer.json`, config, chat template, eos list.

        Where there is only a `tokenizer.model` that one is read (`save` adds a `tokenizer.json`).
        InputError for a folder with neither and for unreadable files.
        """
        folder = Path(path)
        source = folder / "tokenizer.json"
        files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
        config = _read_json(folder / "tokenizer_config.json")
        special_map = _read_json(folder / "special_tokens_map.json")
        special = {
            role: text
            for role in SPECIAL_ROLES
            if (text := _token_text(config.get(role) or special_map.get(role))) is not None
        }
        if source.is_file():
            backend = _parse_backend(files["tokenizer.json"], source)
        elif "tokenizer.model" in files:
            added = _read_json(folder / "added_tokens.json")
            backend, own = backend_of_model(folder / "tokenizer.model", config, added)
            special = own | special
            config = {"add_bos_token": True} | config
        else:
            raise InputError(
                f"{folder} has no tokenizer.json and no tokenizer.model: write one with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        template = _folder_template(folder, config)
        if template is not None:
            ChatTemplate.compile(template)
        max_length = config.get("model_max_length")
        tokenizer = cls(
            backend=backend,
            special=special,
            eos_ids=_folder_eos_ids(folder, backend, special),
            chat_template=template,
            add_bos=bool(config.get("add_bos_token", False)),
            # transformers writes 1e30 for "no limit"
            model_max_length=int(max_length) if max_length and max_length < 1e9 else None,
            files=files,
        )
        if not source.is_file():
            tokenizer = replace(tokenizer, files=tokenizer._own_files() | files)
        return tokenizer._stopping_at_turn_end()

    @classmethod
    def from_gguf_metadata(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """Build from a GGUF file's `tokenizer.*` metadata (plain Python values by key).

        Byte-level and SentencePiece BPE; InputError names an unknown model or pre-tokenizer and the
        known ones.
        """
        backend, special, eos_ids = backend_from_gguf(fields)
        template = fields.get("tokenizer.chat_template")
        if template is not None:
            ChatTemplate.compile(template)
        architecture = fields.get("general.architecture", "")
        max_length = fields.get(f"{architecture}.context_length")
        tokenizer = cls(
            backend=backend,
            special=special,
            eos_ids=eos_ids,
            chat_template=template,
            add_bos=adds(fields, "bos"),
            model_max_length=None if max_length is None else int(max_length),
        )
        return tokenizer._stopping_at_turn_end()

    def save(self, folder: str | Path) -> None:
        """Write the files from which `transformers.AutoTokenizer` builds the same tokenizer."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in (self.files or self._own_files()).items():
            (target / name).write_bytes(content)

    def _own_files(self) -> dict[str, bytes]:
        config: dict[str, Any] = {
            **self.special,
            # The class that takes tokenizer.json as it is; a model's own class would rebuild the
            # pre-tokenizer and lose the splitting of digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.add_bos:
            config["add_bos_token"] = True
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": _json_bytes(config),
            "special_tokens_map.json": _json_bytes(dict(self.special)),
        }


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model folder or of a GGUF file, without its weights.

    InputError where there is none.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return Tokenizer.from_folder(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            return Tokenizer.from_folder(path)
        path = files[0]
    if not path.is_file():
        raise InputError(f"{path} is missing; name a model folder or a .gguf file")
    from moejax.io.gguf import read_metadata  # the gguf package takes a while to import

    return Tokenizer.from_gguf_metadata(read_metadata(path))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; copy it again")
    return value


def _parse_backend(content: bytes, path: Path) -> Backend:
    # Syntax first, because `tokenizers` raises a bare Exception for whatever it dislikes.
    _read_json(path)
    try:
        backend = Backend.from_buffer(content)
    except Exception as error:
        if type(error) not in (Exception, ValueError):
            raise
        raise InputError(f"{path} cannot be read by tokenizers: {error}") from error
    # Some folders store truncation or padding of their last use; ids must not depend on it.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_text(value: Any) -> str | None:
    """A special token as configs spell it: a string, or an AddedToken's fields."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _folder_eos_ids(folder: Path, backend: Backend, special: Mapping[str, str]) -> tuple[int, ...]:
    ids: list[int] = []
    if "eos_token" in special:
        eos = backend.token_to_id(special["eos_token"])
        if eos is None:
            raise InputError(
                f"{folder}: eos_token {special['eos_token']!r} is not in tokenizer.json's "
                "vocabulary; the two files belong to different models"
            )
        ids.append(eos)
    listed = _read_json(folder / "generation_config.json").get("eos_token_id")
    ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
    return tuple(dict.fromkeys(int(i) for i in ids))
