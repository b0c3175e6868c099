"""`launch.shadow --stage=generate`: text from a model that computes what this prompt needs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.shadow_data import Model, load_model
from launch.shadow_train import FOLDERS
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_audit import Audit, AuditConfig, compare
from moejax.methods.shadow_decode import Plan, num_read_bytes
from moejax.methods.shadow_mask import check_sparsity
from moejax.serve import sparse
from moejax.serve.sampling import SamplingConfig

POLICIES = ("predicted", "static", "dense")


def main(values: dict[str, Any]) -> None:
    """Continues the prompts; audits some of them."""
    prompts = values["prompt"]
    if not prompts:
        raise InputError("--prompt is missing: give a text to continue")
    model = load_model(values["config"])
    ready = make_ready(values, model)
    audit = Audit(AuditConfig(values["audit_share"], values["audit_limit"], seed=values["seed"]))
    for line in describe(ready, model, values):
        print(line)
    if values["dry_run"]:
        print("dry run: nothing generated")
        return
    ids = [_encoded(model, text, values["raw"]) for text in prompts]
    began, num_tokens = time.perf_counter(), 0
    for first in range(0, len(ids), values["batch_size"]):
        batch, fell_back = ids[first : first + values["batch_size"]], audit.dense
        for at, answer in enumerate(_answers(ready, model, batch, first, audit, values)):
            num_tokens += len(answer.ids)
            print(f"--- {first + at}{' (dense)' if fell_back else ''}")
            print(model.tokenizer.decode(answer.ids), flush=True)
    rate = num_tokens / (time.perf_counter() - began)
    print(f"---\nspeed    {num_tokens} tokens, {rate:.1f}/s with prompts, compiling and audits")
    if ready.policy.sparsity is not None:
        print(audit)


def make_ready(values: dict[str, Any], model: Model) -> sparse.Sparse:
    """The model laid out for decoding under a policy, with the predictor of --predictor."""
    if values["policy"] not in POLICIES:
        raise InputError(f"--policy={values['policy']}: use {', '.join(POLICIES)}")
    share = check_sparsity(values["sparsity"])
    config = model.loaded.config
    predictor = read_predictor(values, model)
    policy = sparse.Policy(
        predictor.info.sizes,
        None if values["policy"] == "dense" else (share, share),
        values["refresh_every"],
        values["policy"] == "predicted",
    )
    return sparse.ready(model.loaded.params, config, predictor, policy)


def read_predictor(values: dict[str, Any], model: Model) -> predictors.Predictor:
    """The predictor of --predictor, or of --workdir; InputError if it is not of this model."""
    return predictors.load(predictor_folder(values), model.loaded.config, model.sha256)


def predictor_folder(values: dict[str, Any]) -> Path:
    """--predictor, or where training puts it in --workdir; InputError without either."""
    if values["predictor"]:
        return Path(values["predictor"])
    if not values["workdir"]:
        raise InputError(
            "--predictor is missing: name its folder, or with --workdir the run that has one"
        )
    return Path(values["workdir"]) / FOLDERS["unified"]


def describe(ready: sparse.Sparse, model: Model, values: dict[str, Any]) -> list[str]:
    """What will be computed, in lines."""
    policy, sizes = ready.policy, ready.policy.sizes
    lines = [
        f"model    {model.loaded.config.family}, {tree.num_params(model.loaded.params):,} "
        f"parameters; laid out {tree.num_bytes(ready.params) / 1e9:.3f} GB, as the dense one",
    ]
    if policy.sparsity is None:
        return [*lines, "policy   dense"]
    state_size = ready.config.num_heads * predictors.value_size(ready.config)
    plan = sparse.decide(ready, jax.numpy.zeros((1, state_size)))
    assert plan is not None
    read = num_read_bytes(ready.params, ready.config, plan, sizes)
    whole = num_read_bytes(ready.params, ready.config, None, sizes)
    predictor = ready.predictor if ready.asked is None else ready.asked
    count = sum(w.size for w in jax.tree.leaves(predictor))
    share = count / tree.num_params(model.loaded.params)
    lines.append(
        f"policy   {values['policy']} ({share:.2%} of the parameters), of each layer after the "
        f"first {sizes.first}: {plan.lengths[0]} of {sizes.heads} heads by {sizes.unit}, "
        f"{plan.lengths[1]} of {sizes.blocks} blocks of {sizes.block} neurons"
    )
    often = policy.refresh_every
    when = f"every {often} tokens" if often else "by the prompt"
    if not isinstance(plan, Plan):
        when = "in every layer at every token" if ready.asked is not None else "at every token"
        if values["batch_size"] > 1:
            when += "; rows together read what any of them needs"
    lines.append(
        f"reads    {read / 1e6:.0f} MB of weights a token, dense {whole / 1e6:.0f} MB "
        f"({whole / read:.2f}x); decided {when}"
    )
    return lines


def _encoded(model: Model, text: str, raw: bool) -> list[int]:
    if raw:
        return model.tokenizer.encode(text)
    return model.tokenizer.encode_prompt([{"role": "user", "content": text}])


def _answers(ready, model: Model, batch, first: int, audit: Audit, values) -> list[sparse.Answer]:
    """One batch's answers; those that the audit wants are compared with the dense model."""
    dense = dataclasses.replace(ready.policy, sparsity=None)
    if audit.dense:
        ready = dataclasses.replace(ready, policy=dense)
    sampling = SamplingConfig(values["temperature"])
    skips = ready.policy.sparsity is not None
    wanted = [audit.wants(first + at) and skips for at in range(len(batch))]
    answers = sparse.generate(
        ready,
        batch,
        values["max_new_tokens"],
        sampling,
        stop_ids=model.tokenizer.eos_ids,
        seed=values["seed"] + first,
        with_logits=any(wanted),
    )
    for prompt, answer, look in zip(batch, answers, wanted, strict=True):
        # The first token is drawn after the prompt, which both read densely.
        if look and len(answer.ids) > 1:
            assert answer.logits_TV is not None
            exact = sparse.dense_logits(ready, prompt, answer.ids)
            audit.add(compare(exact[1:], np.asarray(answer.logits_TV)[1:]))
    return answers
