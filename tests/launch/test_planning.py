"""Candidates of a sweep: every one divides evenly, none twice, the order that is promised."""

import dataclasses

import jax
import pytest

from configs import base
from configs.esft import deepseek_v2_lite as esft_deepseek_v2_lite
from launch.esft_plan import chosen_experts, esft_program
from launch.planning import (
    candidates,
    changed,
    chosen_candidates,
    describe_exchange,
    model_of,
    setup_of,
)
from launch.settings import step_flops_of
from launch.sweep_table import row_of, table
from moejax.aot.estimate import estimate, estimate_time
from moejax.aot.plan import failed_plan
from moejax.core import tree
from moejax.core.chips import CHIPS
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.models.config import ModelConfig
from moejax.models.flops import num_params, train_flops
from moejax.moe.config import CONVENTIONS, MoEConfig

DENSE = ModelConfig("llama", 512, 2, 64, 128, 4, 2, 16)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(8, 2, **CONVENTIONS["mixtral"]))


def settings(**train):
    config = base.get_config()
    config.train.steps, config.train.batch_size, config.compute.dtype = 1, 8, "bfloat16"
    config.train.update(train)
    return config


@pytest.mark.slow
def test_candidates_of_a_mixture():
    found = candidates(settings(), MOE, "v5p:2x2x1", 4)
    keys = [tuple(sorted(keys.items())) for keys, _ in found]
    assert len(set(keys)) == len(keys) > 50
    for _, setup in found:
        assert setup.num_devices == 4
        assert setup.batch_size % (setup.accumulation * setup.token_parts) == 0
    assert {setup.remat for _, setup in found} == {"nothing", "dots", "full"}
    assert {keys["compute.moe_strategy"] for keys, _ in found} == {"auto", "chunked", "all_gather"}
    fits = [estimate(setup).left >= 0 for _, setup in found]
    assert fits == sorted(fits, reverse=True)
    rows = [row_of(keys, setup, estimate(setup).used) for keys, setup in found[:3]]
    text = table(rows)
    assert text.count("~") > 3 and "best: --config.mesh.data=" in text


def test_a_sweep_tries_what_the_config_asks_for_too():
    config = settings()
    config.compute.update(remat="offload", moe_strategy="ragged")
    found = [keys for keys, _ in candidates(config, MOE, "v5p:2x2x1", 2)]
    assert {keys["compute.remat"] for keys in found} == {"nothing", "dots", "full", "offload"}
    wanted = {"auto", "chunked", "all_gather", "ragged"}
    assert {keys["compute.moe_strategy"] for keys in found} == wanted
    assert {k["compute.moe_strategy"] for k in found if k["mesh.expert"] == 1} == {"auto"}


def test_a_sweep_learns_from_what_did_not_fit():
    config = settings()
    found = candidates(config, MOE, "v5p:2x2x1", 4)
    compiled = []

    def fit(keys, setup):
        compiled.append(estimate(setup).used / setup.chip.hbm_bytes)
        return 1.4  # what is compiled takes more than was reckoned

    chosen = chosen_candidates(found, fit, 4)
    assert len(chosen) == len(compiled) and chosen[0] == 0 and chosen == sorted(chosen)
    assert all(1.4 * used <= 1 for used in compiled[1:])
    assert chosen_candidates(found, fit, 0) == []


def test_esft_is_reckoned_with_state_of_its_experts_alone():
    model, config = model_of(esft_deepseek_v2_lite.get_config())
    alone = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}
    some = setup_of(config, model, alone, CHIPS["v5p"])
    per_layer = 3 * model.d_model * model.moe.expert_ffn
    wanted = 6 * 26 * per_layer / num_params(model)
    assert some.trained_share == pytest.approx(wanted, rel=1e-6)
    config.method.name = "full"
    found, full = estimate(some), estimate(setup_of(config, model, alone, CHIPS["v5p"]))
    assert full.optimizer > 5 * found.optimizer and full.gradients > 5 * found.gradients
    config.method.update(name="esft", experts="")  # not chosen yet: nobody knows
    assert setup_of(config, model, alone, CHIPS["v5p"]).trained_share == 1


def test_a_plan_of_esft_has_state_of_the_chosen_experts_alone():
    whole, config = model_of(esft_deepseek_v2_lite.get_config())
    model = dataclasses.replace(whole, num_layers=3)
    chosen = chosen_experts("spread:6", model)
    assert chosen.experts == {1: (0, 10, 21, 32, 42, 53), 2: (0, 10, 21, 32, 42, 53)}
    mesh = make_mesh(devices=jax.devices()[:1])
    config.train.update(batch_size=1, accumulation=1)
    program = esft_program(config, model, mesh)
    sizes = {path: leaf.shape for path, leaf in tree.flatten(program.state.params).items()}
    assert sizes and all("experts" in path and shape[0] == 12 for path, shape in sizes.items())
    upcycled = dataclasses.replace(DENSE, moe=MoEConfig(4, 2))  # its first expert is shared
    assert set(chosen_experts("spread:2", upcycled).experts.values()) == {(1, 2)}
    for source, words in (
        ("", "is missing"),
        ("spread:65", "N from 1 to 64"),
        ("spread:x", "N from"),
    ):
        with pytest.raises(InputError, match=words):
            chosen_experts(source, model)


def test_how_tokens_travel_is_said_and_why_if_auto_chose():
    sizes = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}

    def said(model=MOE, sizes=sizes, **compute):
        config = settings()
        config.data.seq_len = 4096
        config.compute.update(compute)
        return describe_exchange(setup_of(config, model, sizes, CHIPS["v6e"]))

    assert said().startswith("exchange by chunked: 4096 tokens x top-2 over 8 expert shards on v6e")
    assert said(moe_strategy="ragged") == "exchange by ragged"
    assert said(DENSE) == said(sizes=sizes | {"expert": 1, "fsdp": 8}) == ""


def test_frozen_weights_count_less():
    alone = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    plain, some = (
        setup_of(settings(freeze=freeze), DENSE, alone, CHIPS["v5p"])
        for freeze in ("", "layers/**, embed/**")
    )
    assert estimate_time(some).compute_s < 0.85 * estimate_time(plain).compute_s
    tokens = plain.batch_size * plain.seq_len
    failed = failed_plan(some, RuntimeError("RESOURCE_EXHAUSTED"), 1.0)
    assert failed.model_flops == train_flops(DENSE, tokens, plain.seq_len, some.freeze)
    assert failed.model_flops == step_flops_of(settings(freeze="layers/**,embed/**"), DENSE)


def test_a_dense_model_has_no_expert_axis():
    found = candidates(settings(), DENSE, "v5p:2x2x1", 4)
    assert {keys["mesh.expert"] for keys, _ in found} == {1}


def test_a_changed_config_leaves_the_first_alone():
    config = settings()
    other = changed(config, {"train.batch_size": 64, "compute.remat": "full"})
    assert (other.train.batch_size, other.compute.remat) == (64, "full")
    assert (config.train.batch_size, config.compute.remat) != (64, "full")


def test_sizes_come_from_the_preset_where_the_source_is_not_here():
    config = settings()
    config.model.source, config.model.preset = "somebody/something", "mixtral-8x7b"
    assert model_of(config)[0].moe.num_experts == 8
    config.model.dtype = "keep"
    with pytest.raises(InputError, match='dtype "keep" needs a model'):
        model_of(config)
