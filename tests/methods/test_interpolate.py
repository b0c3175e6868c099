"""WiSE-FT's mixture: the ends bit for bit, the formula between, rules by place, one compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import soup
from moejax.methods.interpolate import (
    Deltas,
    ema_weights,
    greedy_soup,
    interpolate,
    lora_delta,
    mix,
)
from moejax.methods.upcycle import upcycle
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests.draws import model_params, moved

DENSE = ModelConfig("llama", 31, 3, 16, 24, 2, 1, 8)


def ends(dtype="float32"):
    late = model_params(DENSE)
    early = moved(late, 1, 0.3)
    return tuple(jax.tree.map(lambda x: jnp.asarray(x, dtype), end) for end in (early, late))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ends_are_kept_bit_for_bit_and_the_middle_is_the_formula(dtype):
    early, late = ends(dtype)
    assert not tree.diff(interpolate(early, late, DENSE, Deltas(0.0)), late)
    assert not tree.diff(interpolate(early, late, DENSE, Deltas(1.0)), early)
    mixed = tree.flatten(interpolate(early, late, DENSE, Deltas(0.25)))
    for path, leaf in mixed.items():
        pair = (np.asarray(tree.flatten(end)[path], np.float32) for end in (early, late))
        first, second = pair
        wanted = (np.float32(0.25) * first + np.float32(0.75) * second).astype(leaf.dtype)
        gap = np.abs(np.asarray(leaf, np.float32) - wanted.astype(np.float32))
        # Fused multiply-add may round once where numpy rounds twice.
        assert gap.max() <= jnp.finfo(dtype).eps * np.abs(wanted.astype(np.float32)).max(), path


def test_delta_may_be_traced_so_that_a_sweep_compiles_once():
    early, late = ends()
    num_traces = 0

    @jax.jit
    def mixed(delta):
        nonlocal num_traces
        num_traces += 1
        return jax.tree.map(lambda x, y: mix(x, y, delta), early, late)

    assert not tree.diff(mixed(0.0), late)
    assert not tree.diff(mixed(1.0), early)
    mixed(0.5)
    assert num_traces == 1


def test_rules_by_place_and_which_of_them_wins():
    early, late = ends()
    rules = Deltas(0.5, patterns=(("**/attn/**", 0.0), ("embed/*", 1.0)), layers=(0.0, 1.0))
    found = tree.flatten(interpolate(early, late, DENSE, rules))
    first, second = tree.flatten(early), tree.flatten(late)
    for path, leaf in found.items():
        if "/attn/" in path:
            np.testing.assert_array_equal(leaf, second[path])
        elif path.startswith("embed/"):
            np.testing.assert_array_equal(leaf, first[path])
        elif path.startswith("layers/"):
            np.testing.assert_array_equal(leaf[0], second[path][0])
            np.testing.assert_array_equal(leaf[2], first[path][2])
            np.testing.assert_allclose(leaf[1], (first[path][1] + second[path][1]) / 2, rtol=1e-6)
        else:
            np.testing.assert_allclose(leaf, (first[path] + second[path]) / 2, rtol=1e-6)


def test_each_expert_may_have_its_own_delta():
    late, config = upcycle(model_params(DENSE), DENSE, MoEConfig(3, 2), jax.random.key(0))
    early = moved(late, 1, 0.3)
    mixed = interpolate(early, late, config, Deltas(0.0, experts=(0.0, 1.0, 0.5)))
    stack, first, second = (
        tree.flatten(t)["layers/0/moe/experts/w_up"] for t in (mixed, early, late)
    )
    np.testing.assert_array_equal(stack[:, 0], second[:, 0])
    np.testing.assert_array_equal(stack[:, 1], first[:, 1])
    np.testing.assert_allclose(stack[:, 2], (first[:, 2] + second[:, 2]) / 2, rtol=1e-6)
    router = "layers/0/moe/router/w_out"
    np.testing.assert_array_equal(tree.flatten(mixed)[router], tree.flatten(late)[router])


def test_what_cannot_be_mixed_is_one_line():
    early, late = ends()
    for bad, said in [
        (lambda: Deltas(1.2), "outside"),
        (lambda: Deltas(float("nan")), "nan"),
        (lambda: interpolate(early, late, DENSE, Deltas(patterns=(("none/**", 0.1),))), "fits no"),
        (lambda: interpolate(early, late, DENSE, Deltas(experts=(0.1,))), "0 experts"),
        (lambda: interpolate(early, {"embed": late["embed"]}, DENSE), "differ"),
        (lambda: interpolate(ends("bfloat16")[0], late, DENSE), "differ"),
    ]:
        with pytest.raises(InputError, match=said):
            bad()
    Deltas(1.2, extrapolate=True)


def test_ema_weights_are_those_of_the_recurrence():
    values = np.random.default_rng(0).standard_normal(5)
    average = values[0]
    for value in values[1:]:
        average = 0.8 * average + 0.2 * value
    weights = ema_weights(5, 0.8)
    np.testing.assert_allclose(np.dot(weights, values), average)
    np.testing.assert_allclose(sum(weights), 1)
    with pytest.raises(InputError, match="decay"):
        ema_weights(3, 1.0)


def test_greedy_soup_takes_what_does_not_hurt():
    points = np.array([1.0, -1.2, 5.0])  # the best mean is nearest to 0

    def score(members):
        return -abs(points[list(members)].mean())

    assert greedy_soup([-abs(p) for p in points], score) == (0, 1)


def test_lora_is_interpolated_as_the_product():
    rng = np.random.default_rng(0)
    early, late = (
        tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, r), (r, 5)))
        for r in (2, 3)
    )
    wanted = 0.3 * np.asarray(early[0] @ early[1]) + 0.7 * np.asarray(late[0] @ late[1])
    np.testing.assert_allclose(lora_delta(early, late, 0.3), wanted, rtol=1e-5, atol=1e-6)


def test_slerp_keeps_the_ends_and_the_length_of_equal_ones():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2))
    second *= np.linalg.norm(first) / np.linalg.norm(second)
    assert soup.slerp([first, second], 0.0) is second
    assert soup.slerp([first, second], 1.0) is first
    half = soup.slerp([first, second], 0.5)
    np.testing.assert_allclose(np.linalg.norm(half), np.linalg.norm(first), rtol=1e-5)
    np.testing.assert_allclose(
        half / np.linalg.norm(half),
        (first + second) / np.linalg.norm(first + second),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(soup.slerp([first, first], 0.3), first, rtol=1e-6)


def test_ties_on_an_example_worked_by_hand():
    base = np.zeros(4, np.float32)
    first = np.array([3, -1, 2, 0.1], np.float32)
    second = np.array([-1, -3, 0.2, 2], np.float32)
    # The larger half stays: [3, 0, 2, 0] and [0, -3, 0, 2]; no signs clash.
    found = soup.ties([base, first, second], 1.0, 0.5)
    np.testing.assert_allclose(found, [3, -3, 2, 2])
    # All stay: signs +, -, +, +; of the first entry 3 alone agrees.
    found = soup.ties([base, first, second], 1.0, 1.0)
    np.testing.assert_allclose(found, [3, -2, 1.1, 1.05], rtol=1e-6)


def test_dare_is_unbiased_and_drops_nothing_at_density_one():
    rng = np.random.default_rng(0)
    base, model = (rng.standard_normal(20_000).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(
        soup.dare([base, model], 1.0, 1.0, 0, "w"), model, rtol=1e-5, atol=1e-6
    )
    thinned = soup.dare([base, model], 1.0, 0.25, 0, "w") - base
    assert abs(np.mean(thinned != 0) - 0.25) < 0.02
    np.testing.assert_allclose(
        thinned[thinned != 0], 4 * (model - base)[thinned != 0], rtol=1e-3, atol=1e-4
    )
    again = soup.dare([base, model], 1.0, 0.25, 0, "w") - base
    np.testing.assert_array_equal(thinned, again)
    for density in (0.0, 1.5):
        with pytest.raises(InputError, match="density"):
            soup.check_density(density)
