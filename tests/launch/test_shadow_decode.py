"""launch.shadow's generate and bench on a tiny model with a predictor of random weights."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import shadow_bench, shadow_generate, shadow_speed, shadow_tables
from launch.shadow_data import load_model
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_decode as decode
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_mask import Mask
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.report import shadow_plots
from moejax.serve import sparse
from tests.launch.test_shadow import settings, write

ASKED = {
    "config": None,
    "workdir": None,
    "predictor": None,
    "dry_run": False,
    "prompt": ["hello ab", "What is 3 and 3?"],
    "raw": True,
    "policy": "predicted",
    "sparsity": 0.5,
    "refresh_every": 0,
    "audit_share": 0.0,
    "audit_limit": 0.5,
    "max_new_tokens": 5,
    "batch_size": 1,
    "temperature": 0.0,
    "seed": 0,
    "peer": False,
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Flags of a run whose predictor is there."""
    folder = tmp_path_factory.mktemp("shadow")
    write(folder)
    flags = ASKED | {"config": settings(folder), "workdir": str(folder / "run")}
    model = load_model(flags["config"])
    config, sizes = model.loaded.config, model.sizes
    draw = np.random.default_rng(0)
    shapes = [(sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
    static = Mask(*(draw.random(shape).astype(np.float32) for shape in shapes))
    params = predictors.init(jax.random.key(0), 32, 8, static)
    params["w_out_blocks"] = jax.random.normal(jax.random.key(1), params["w_out_blocks"].shape)
    order = np.stack([draw.permutation(64) for _ in range(3)]).astype(np.int32)
    fields = predictors.fields_of(config)
    info = predictors.PredictorInfo(model.sha256, fields, sizes, "plainact", "unified", 8)
    predictors.save(folder / "run" / "predictor", predictors.Predictor(info, params, order, static))
    shapes = {"heads/w_2": (3, 5, 4), "neurons/w_2": (3, 5, 64)}
    shapes |= {f"{part}/w_1": (3, 32, 5) for part in ("heads", "neurons")}
    drawn = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    info = dataclasses.replace(info, variant="dejavu", hidden=5)
    dejavu = predictors.Predictor(info, tree.unflatten(drawn), order, static)
    predictors.save(folder / "run" / "predictor_dejavu", dejavu)
    return flags


def dejavu_of(asked):
    """Flags that name the predictors that every layer asks."""
    return {"predictor": f"{asked['workdir']}/predictor_dejavu"}


def said(asked, capsys, **changes):
    shadow_generate.main(asked | changes)
    return capsys.readouterr().out


def answers(text):
    """What stands between the lines that begin an answer."""
    spoken = text.partition("---\nspeed")[0]
    return [part.split("\n", 1)[1] for part in spoken.split("--- ")[1:]]


def test_nothing_skipped_is_dense_and_half_is_not(asked, capsys):
    dense = answers(said(asked, capsys, policy="dense"))
    assert answers(said(asked, capsys, sparsity=0.0)) == dense
    half = said(asked, capsys)
    assert answers(half) != dense
    assert "2 of 4 heads by query, 4 of 8 blocks of 8 neurons" in half
    assert "audit    0 of 2 requests" in half
    assert answers(said(asked, capsys, batch_size=2)) == answers(half)


def test_layers_that_decide(asked, capsys):
    """With DejaVu's predictors: nothing skipped is dense, rows together are rows alone."""
    dense = answers(said(asked, capsys, policy="dense"))
    assert answers(said(asked, capsys, **dejavu_of(asked), sparsity=0.0)) == dense
    half = said(asked, capsys, **dejavu_of(asked))
    assert answers(half) != dense and "2 of 4 heads by query, 4 of 8 blocks" in half
    assert "decided in every layer at every token\n" in half
    pair = said(asked, capsys, **dejavu_of(asked), batch_size=2, audit_share=1.0)
    assert answers(pair) == answers(half) and "2 of 2 requests run dense as well" in pair
    assert "at every token; rows together read what any of them needs" in pair


def test_an_audit_past_the_limit_turns_to_the_dense_model(asked, capsys):
    prompts = ["hello ab", "count", "say 1", "say 2", "hello ab"]
    changes = {"audit_share": 1.0, "audit_limit": 1e-9, "prompt": prompts}
    out = said(asked, capsys, **changes)
    assert "4 of 5 requests run dense as well" in out and "dense since request 4" in out
    assert "--- 3\n" in out and "--- 4 (dense)\n" in out
    assert answers(out)[4:] == answers(said(asked, capsys, policy="dense", prompt=prompts[4:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "--prompt is missing"),
        ({"sparsity": 1.0}, r"lies outside \[0, 1\)"),
        ({"policy": "some"}, "use predicted, static, dense"),
        ({"audit_share": 2.0}, r"audit_share 2 lies outside \[0, 1\]"),
        ({"refresh_every": -1}, "refresh_every must be 0"),
        ({"predictor": "nowhere"}, "nowhere has no shadow.json"),
        ({"workdir": None}, "--predictor is missing"),
        ({"predictor": "dejavu", "refresh_every": 2}, "decide at every token: leave out refresh"),
    ],
)
def test_what_cannot_be_is_one_line(asked, changes, message):
    changes = changes | (dejavu_of(asked) if changes.get("predictor") == "dejavu" else {})
    with pytest.raises(InputError, match=message) as caught:
        shadow_generate.main(asked | changes)
    assert "\n" not in str(caught.value)


def test_a_predictor_of_other_weights_is_refused(asked, tmp_path):
    write(tmp_path, seed=1)
    with pytest.raises(InputError, match="a predictor for other weights"):
        shadow_generate.main(asked | {"config": settings(tmp_path)})


@pytest.mark.slow
def test_bench_writes_rows_that_the_report_joins(asked, monkeypatch):
    monkeypatch.setattr(shadow_bench, "measure", functools.partial(shadow_speed.measure, rounds=1))
    shadow_bench.main(asked | {"refresh_every": 4})
    shadow_bench.main(asked | {"refresh_every": 4})  # again: its row takes the place of the first
    shadow_bench.main(asked | dejavu_of(asked))
    with pytest.raises(InputError, match="leave out refresh_every"):
        shadow_bench.main(asked | dejavu_of(asked) | {"refresh_every": 1})
    with open(f"{asked['workdir']}/bench.json") as file:
        row, other = json.load(file)["rows"]
    assert (row["refresh_every"], row["decided"]) == (4, "every 4 tokens")
    assert (other["refresh_every"], other["decided"]) == (1, "in every layer")
    assert other["predictor"] == predictors.hash_folder(f"{asked['workdir']}/predictor_dejavu")
    assert row["sparsity"] == 0.5 and row["block"] == 8
    assert row["predictor"] == predictors.hash_folder(f"{asked['workdir']}/predictor")
    assert row["against_dense"] > 0 and row["tokens_per_s"] > 0
    assert row["share_of_bound"] == pytest.approx(row["against_dense"] / row["bound"])


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({}, True),
        ({"predictor": "another"}, False),
        ({"refresh_every": 4}, False),
        ({"predictor": "of tokens", "refresh_every": 1}, True),
        ({"predictor": "of tokens"}, False),
        ({"predictor": "of layers", "refresh_every": 1}, True),
    ],
)
def test_speed_stands_beside_quality_of_the_same_mask_alone(changes, joined):
    record = {"nats": [1.0, 2.0], "counts": [2, 2]}
    dense = {"nats": [0.5, 0.5], "counts": [2, 2]}
    methods = {"of tokens": "predicted_token", "of layers": "dejavu_equal_token"}
    method = methods.get(changes.get("predictor"), "predicted")
    records = {
        ("wikitext", f"{method}-both-0.5-local"): record,
        ("wikitext", "dense-both-0-local"): dense,
    }
    names = {"mine": "unified", "of tokens": "token", "of layers": "dejavu_equal"}
    row = {"model": "llama", "sparsity": 0.5, "refresh_every": 0, "predictor": "mine"}
    row |= {"against_dense": 1.5, "bound": 1.6, "against_dense_rounds": [1.5]}
    (found,) = shadow_tables.quality_and_speed([row | changes], records, names)
    assert "against_dense_rounds" not in found
    if joined:
        assert found["wikitext perplexity"] == pytest.approx(np.exp(0.75))
        assert found["wikitext perplexity, dense"] == pytest.approx(np.exp(0.25))
    else:
        assert not any("wikitext" in name for name in found)
    axes = shadow_plots.speed_plot([row | changes]).axes[0]
    said = "predictor included" if "refresh_every" in changes else "masks by the prompt"
    assert axes.get_title().endswith(said)


def test_a_bench_that_could_not_be_right_is_one_line(asked):
    with pytest.raises(InputError, match="refresh_every=3: a bench times 0, 1, 2, 4, 8"):
        shadow_bench.main(asked | {"refresh_every": 3})
    mixed = ModelConfig("llama", 50, 4, 32, 64, 4, 4, 8, moe=MoEConfig(3, 2), num_dense_layers=1)
    with pytest.raises(InputError, match="pip install|layers are alike"):
        shadow_speed.check_peer(mixed)


def test_bytes_of_a_token_are_those_of_what_is_kept(monkeypatch):
    """By hand: 4 layers of which 1 is dense, half of the heads' and neurons' matrices elsewhere."""
    config = ModelConfig("opt", 50, 4, 32, 64, 4, 4, 8, gated=False, activation="relu")
    monkeypatch.setattr(shadow_speed, "SHARE", 0.5)  # 1% of so small a model is nothing
    setup = shadow_speed.random_setup("tiny", config, 2, 8)
    kept_layer = 2 * 32 * 32 + (2 * 32 * 32 + 2 * 32 * 64) // 2
    whole_layer = 4 * 32 * 32 + 2 * 32 * 64
    rest = 50 * 32 + 32  # the head and one row of the table
    norms = (2 * 4 + 1) * 32
    wanted = 4 * (whole_layer + 3 * kept_layer + rest + norms)
    assert shadow_speed.read_bytes(setup, 0.5) == wanted
    refreshed = dataclasses.replace(setup, refresh_every=2)
    half = sum(w.size for w in jax.tree.leaves(setup.predictor)) * 4 // 2
    assert shadow_speed.read_bytes(refreshed, 0.5) == wanted + half
    deciding = shadow_speed.asking(setup)
    asked = sum(w.size for w in jax.tree.leaves(deciding.asked))
    width = deciding.asked[0]["heads"]["w_1"].shape[1]
    assert len(deciding.asked) == 3 and asked == 3 * width * (2 * 32 + 4 + 64)
    assert asked * 4 / 3 <= sum(w.size for w in jax.tree.leaves(setup.predictor))
    assert shadow_speed.read_bytes(deciding, 0.5) == wanted + 4 * asked
    dense = decode.num_read_bytes(setup.plain, config, None, setup.sizes)
    assert dense == 4 * (4 * whole_layer + rest + norms)
    logits = [
        sparse.start(shadow_speed._model(setup, None, params), [[1, 2, 3]], 4).logits_BV
        for params in (setup.plain, setup.laid_out)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(logits[0]).all()
