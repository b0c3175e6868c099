"""The lineage in a few lines of Python: a model in hand, and functions that return new ones."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import lineage
from moejax.io.hf import has_class
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.sharded import Place, on_mesh
from moejax.methods import merge as merging
from moejax.methods.interpolate import Deltas
from moejax.methods.interpolate import interpolate as interpolate_params
from moejax.methods.merge import MergeConfig
from moejax.methods.upcycle import upcycle as upcycle_params
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import XFT_WEIGHTINGS, MoEConfig
from moejax.serve.generate import GenerateConfig, generate
from moejax.serve.sampling import SamplingConfig

Prompt = str | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, config, tokenizer and history of one model; nothing in it is ever changed."""

    loaded: Loaded

    @property
    def params(self) -> tree.Tree:
        """The parameter tree (`moejax.models.transformer.abstract_params`)."""
        return self.loaded.params

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.loaded.config

    @property
    def tokenizer(self):
        """Text to ids and back (`moejax.io.tokenizer.Tokenizer`); None where there was none."""
        return self.loaded.tokenizer

    @property
    def lineage(self) -> tuple[dict[str, Any], ...]:
        """The operations that made it, first to last."""
        return self.loaded.lineage

    def logits(self, tokens: Any) -> jax.Array:
        """Float32 logits [B, T, V] of int token ids [B, T], each row on its own and unpadded.

        Computed in the parameters' own dtype. InputError for ids outside the vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens must be integers [B, T], got {ids.dtype}{list(ids.shape)}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise InputError(
                f"tokens must lie in [0, {self.config.vocab_size}), got {ids.min()} to {ids.max()}"
            )
        dtype = str(self.params["embed"]["tokens"].dtype)
        return _logits(self.params, self.config, jnp.asarray(ids, jnp.int32), dtype)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        sampling: SamplingConfig = SamplingConfig(),
        seed: int = 0,
        raw: bool = False,
    ) -> list[str]:
        """Answers, one text per prompt.

        Args:
          prompts: texts, or conversations as lists of {"role", "content"}; one or several.
          max_new_tokens: upper bound on each answer.
          sampling: greedy by default.
          seed: of the sampling; an answer depends on its row and the seed, not on its neighbours.
          raw: continue the text itself, without the model's chat template.
        """
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer: prompts cannot be read")
        ids = [self._encode(prompt, raw) for prompt in _as_list(prompts)]
        config = GenerateConfig(
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=tuple(self.tokenizer.eos_ids),
            seed=seed,
            options=transformer.ForwardOptions(
                compute_dtype=str(self.params["embed"]["tokens"].dtype)
            ),
        )
        answers = generate(self.params, self.config, ids, config)
        return [self.tokenizer.decode(answer.ids) for answer in answers]

    def _encode(self, prompt: Prompt, raw: bool) -> list[int]:
        if raw:
            if not isinstance(prompt, str):
                raise InputError("raw prompts are texts, not conversations")
            return self.tokenizer.encode(prompt, add_special=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode_prompt(messages)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        dtype: str = "keep",
        overwrite: bool = False,
    ) -> None:
        """Writes a folder: "hf" if transformers has a class for the model, else "orbax", ours."""
        format = format or ("hf" if has_class(self.config) else "orbax")
        save_any(self.loaded, path, format=format, dtype=dtype, overwrite=overwrite)


def load(
    source: str | os.PathLike[str],
    dtype: str = "keep",
    *,
    mesh: jax.sharding.Mesh | None = None,
    sharding: Place | None = None,
) -> Model:
    """Loads a Hugging Face folder, a hub id, a GGUF file, or a folder of our own.

    Args:
      source: which.
      dtype: "keep", or "float32", "bfloat16", "float16" for the parameters.
      mesh: of `moejax.core.mesh.make_mesh`: parameters lie on it as `moejax.core.sharding` rules,
        and each process reads only the slices that its devices hold.
      sharding: the same by a rule of your own, (path, leaf) -> `jax.sharding.Sharding`.

    Without either, parameters are numpy arrays on the host. InputError for both.
    """
    if mesh is not None and sharding is not None:
        raise InputError("mesh and sharding both say where parameters lie: give one of them")
    return Model(load_any(source, dtype, place=on_mesh(mesh) if mesh is not None else sharding))


def upcycle(model: Model, experts: int = 8, top_k: int = 6, *, seed: int = 0, **moe: Any) -> Model:
    """A mixture of `experts` experts that computes what the dense model computes (XFT, 3.1).

    `experts` and `top_k` count the shared expert. Further keywords are fields of `MoEConfig`
    (gate, weighting, noise, ...); only XFT's weightings have a shared expert.
    """
    if moe.get("weighting", "normalized") not in XFT_WEIGHTINGS:
        moe.setdefault("num_shared", 0)
    moe_config = MoEConfig(num_experts=experts, top_k=top_k, **moe)
    params, config = upcycle_params(model.params, model.config, moe_config, jax.random.key(seed))
    args = dataclasses.asdict(moe_config) | {"seed": seed}
    return derive(model, params, config, "upcycle", args)


def merge(
    model: Model, coefficients: tree.Tree | None = None, *, lam: float = 0.75, **merge: Any
) -> Model:
    """The dense model of the original size that mixes the experts (XFT, 3.2).

    coefficients: as learned by the merge stage; None mixes the routed experts equally.
    lam: weight of the shared expert (1 keeps it alone). Further keywords are fields of
    `MergeConfig`.
    """
    settings = MergeConfig(lam=lam, **merge)
    if coefficients is None:
        coefficients = merging.init_coefficients(model.config, settings)
    params, config = merging.merge_experts(model.params, model.config, coefficients, settings)
    results = merging.describe(model.config, coefficients, settings)
    return derive(model, params, config, "merge", dataclasses.asdict(settings), results)


def interpolate(early: Model, late: Model, delta: float = 0.5, **deltas: Any) -> Model:
    """delta * early + (1 - delta) * late, two checkpoints of one run (WiSE-FT).

    delta is the share of the early one. Further keywords are fields of `Deltas` (patterns,
    layers, experts, extrapolate). InputError where the models are not of one kind.
    """
    rules = Deltas(delta, **deltas)
    if early.config != late.config:
        raise InputError("the two models have different configs: mix checkpoints of one run")
    params = interpolate_params(early.params, late.params, late.config, rules)
    args = {"method": "wise", "deltas": dataclasses.asdict(rules)}
    return derive(late, params, late.config, "interpolate", args)


def derive(
    model: Model,
    params: tree.Tree,
    config: ModelConfig,
    op: str,
    args: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> Model:
    """A model made out of another one, with one more operation in its lineage."""
    operations = lineage.append(model.lineage, op, (), args, results)
    loaded = dataclasses.replace(model.loaded, params=params, config=config, lineage=operations)
    return Model(loaded)


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    one_conversation = bool(several) and isinstance(several[0], Mapping)
    return [several] if one_conversation else several


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _logits(params, config: ModelConfig, tokens_BT, dtype: str) -> jax.Array:
    options = transformer.ForwardOptions(compute_dtype=dtype)
    return transformer.logits(params, config, tokens_BT, options=options)
