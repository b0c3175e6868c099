"""The rivals of a bridge train in the same harness; the study's texts, words and scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import graft as graft_config
from launch.graft_lab import example_of, pieces, plain
from launch.graft_loss import make_loss, trained_parts
from launch.graft_policy import on_policy
from launch.graft_scores import first_words
from launch.graft_setup import make_setup, states_of
from launch.graft_train import batches, fit_method, rows_of
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.grafting import Text, make_example
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.data.test_alignment import WORDS, tokenizers
from tests.fake_devices import results, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods")
    tokenizer = tokenizers()[0]
    for seed, (name, width) in enumerate({"source": 24, "target": 16}.items()):
        config = ModelConfig(
            "llama", tokenizer.vocab_size, 2, width, 24, 2, 1, 8, max_position=64,
            tie_embeddings=True,
        )
        params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(seed)))
        save_any(Loaded(params, config, tokenizer), path / name, "hf")
    return path


def setup_of(folder: Path, method: str, **changes):
    config = graft_config.get_config()
    config.source.model, config.target.model = str(folder / "source"), str(folder / "target")
    config.method = method
    config.bridge.update(alignment="same", every=1, num_heads=2, bottleneck=4)
    config.data.update(target_len=32, source_len=32)
    config.train.update(steps=3, batch_size=4, lr=1e-2, save_every=0)
    config.distill.update(prompt=4, length=12, on_policy=1.0)
    config.update_from_flattened_dict(changes)
    return make_setup(config)


def examples_of(setup):
    rng = np.random.default_rng(0)
    return [make_example(Text("", " ".join(rng.choice(WORDS[:9], 4))), setup.joined)
            for _ in range(8)]


# "bridge" is trained by test_graft.py, "shuffled" differs by its rows, "reverse" by its formula.
@pytest.mark.parametrize("method", ["adapter", "forward", "gkd", "hidden"])
def test_every_method_learns_with_as_many_parameters(folder, tmp_path, method):
    setup = setup_of(folder, method)
    loaded = load_any(setup.config.target.model, "float32")
    sizes = [tree.num_params(trained_parts(s, loaded.params)[0])
             for s in (setup, setup_of(folder, "bridge"))]
    assert abs(sizes[0] - sizes[1]) <= 33 * 2 + 16 * 24  # one width, and hidden's projection
    result = fit_method(
        setup, loaded.params, (examples_of(setup), None), tmp_path, None, lambda text: None, True
    )
    name = {"gkd": "distance"}.get(method, "nll")
    losses = [record[name] for record in result.records]
    assert losses[-1] < losses[0]


def test_the_teacher_itself_has_no_distance(folder):
    setup = setup_of(folder, "forward", **{"target.model": str(folder / "source")})
    loaded = load_any(setup.config.target.model, "float32")
    trainable, frozen = trained_parts(setup, loaded.params)
    source = setup.source_params()
    frozen |= {"source": source, "source_head": source}
    rows = rows_of(setup, examples_of(setup), range(4), None)
    assert abs(float(make_loss(setup)(trainable, frozen, rows, None)[1]["distance"])) < 1e-6


def test_the_students_own_rows(folder):
    setup = setup_of(folder, "gkd")
    loaded = load_any(setup.config.target.model, "float32")
    trainable, frozen = trained_parts(setup, loaded.params)
    frozen["source"] = setup.source_params()
    given = batches(setup, examples_of(setup), None)
    feed = on_policy(setup, given, frozen)
    rows, plain_rows = feed(0, trainable), given(0)
    np.testing.assert_array_equal(rows["tokens"][:, :4], plain_rows["tokens"][:, :4])
    assert rows["loss_mask"][:, 4:12].all() and not rows["loss_mask"][:, :4].any()
    assert not rows["segment_ids"][:, 12:].any()
    # With a model that is all but certain, what it wrote is what it finds most likely.
    sharp = jax.tree.map(lambda x: x, trainable)
    sharp["target"]["final_norm"] = jax.tree.map(lambda x: x * 400, sharp["target"]["final_norm"])
    ids = feed(0, sharp)["tokens"][:, :12]
    best = np.argmax(transformer.logits(sharp["target"], setup.target.config, ids), -1)
    assert (best[:, 3:11] == ids[:, 4:]).mean() > 0.95


def test_another_texts_states(folder):
    setup = setup_of(folder, "shuffled")
    examples = examples_of(setup)
    mine = rows_of(setup, examples, range(4), None)
    usual = rows_of(setup_of(folder, "bridge"), examples, range(4), None)
    np.testing.assert_array_equal(mine["source_tokens"][1], usual["source_tokens"][0])
    np.testing.assert_array_equal(mine["tokens"], usual["tokens"])
    lengths = [len(examples[i - 1].source_ids) for i in range(4)]
    assert (mine["limits"].max(1) <= lengths).all()
    assert states_of(setup, setup.source_params(), mine["source_tokens"]).shape == (4, 32, 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "magic"}, "is unknown: use bridge"),
        ({"bridge.alignment": "settled"}, "needs one tokenizer"),
        ({"source.layers": (0,)}, "final states"),
        ({"target.train": "some"}, "use all, lora, none"),
        ({"distill.prompt": 40}, "distill.prompt=40"),
        ({"distill.on_policy": 2.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_trained(folder, changes, said):
    with pytest.raises(InputError, match=said):
        setup = setup_of(folder, **({"method": "gkd"} | changes))
        trainable, frozen = trained_parts(setup, {})
        on_policy(setup, None, frozen | {"source": None})


def test_texts_of_the_study(folder):
    article = """ = A <unk> title = \n \n He said , " a @-@ b " ( 1 @,@ 000 ) of <unk> 's . \n"""
    assert plain(article) == """He said, "a-b" (1,000) of <unk>'s."""
    setup = setup_of(folder, "bridge")
    text = "the capital <unk> of France is Paris, the capital of France is Paris,"
    example = example_of(text, setup)
    hidden = [i for i, yes in enumerate(example.counted) if not yes]
    told = setup.joined.target.decode([example.target_ids[i] for i in hidden[1:]])
    assert hidden[0] == 0 and told.strip() == "<unk>"
    first = setup.joined.target.decode(example.target_ids[:1])
    assert example.num_bytes == len(text) - len(told) - len(first)
    cut = pieces(text, setup.joined.target, 12)
    assert text.startswith(" ".join(cut)) and len(cut) > 1
    words = first_words(dataclasses.replace(example), setup.joined.target, 2)
    found = [setup.joined.target.decode(example.target_ids[a:b]) for a, b in words]
    assert " <unk>" not in found and set(found) <= {" capital", " of", " France", " is", " Paris",
                                                    " the"}


@pytest.mark.slow
def test_a_source_on_eight_devices_dense_and_moe(tmp_path):
    found = results(start("launch/graft_source_mesh.py", 8, str(tmp_path)))
    assert len(found) == 4 and {r["devices"] for r in found} == {8}
    assert all(r["error"] < (1e-5 if r["dtype"] == "float32" else 2e-2) for r in found), found
