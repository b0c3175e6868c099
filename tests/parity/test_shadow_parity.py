"""Every criterion of ShadowLLM: torch's gradients and numpy's sums on a tiny model."""

import jax
import numpy as np
import pytest

from moejax.methods import shadow_scores
from moejax.methods.shadow_measure import Asked, measure
from moejax.models import transformer
from tests.shadow_cases import LLAMA, OPT, PROMPT, TEXT, TOKENS, F, H, L


@pytest.fixture(scope="module", params=[LLAMA, OPT], ids=["llama", "opt"])
def both(request):
    config = request.param
    params = transformer.init_params(config, jax.random.key(3))
    found = jax.device_get(measure(params, config, TEXT, Asked(), 24))  # 4 slots of padding
    names = ("plainact", "fisher", "snip", "nwot", "epenas")
    parity = jax.device_get(measure(params, config, TEXT, Asked(names, parity=True), 24))
    from tests.parity.shadow_reference import Reference, grad_of  # torch may be missing

    ref = Reference(config, params)
    wanted = [*ref.probes, *ref.spots]
    grads = grad_of(ref.loss, wanted, create_graph=True)
    size = sum((g * g.detach()).sum() for g in grads)
    curved = grad_of(size, wanted, retain_graph=True)
    names = [n for n in ("w_gate", "w_up", "w_down") if n in ref.layers["mlp"]]
    weights = [ref.layers["mlp"][n] for n in names]
    of_weights = grad_of(ref.loss, weights)
    ref.g, ref.ga = [g.detach().numpy() for g in grads[:L]], [g.detach().numpy() for g in grads[L:]]
    ref.hg, ref.hga = [h.numpy() for h in curved[:L]], [h.numpy() for h in curved[L:]]
    ref.W = {n: w.detach().numpy() for n, w in zip(names, weights, strict=True)}
    ref.G = {n: g.numpy() for n, g in zip(names, of_weights, strict=True)}
    ref.x, ref.a = [x.numpy() for x in ref.x], [a.numpy() for a in ref.a]
    return found, parity, ref


def same(got, want):
    """Equal up to float32's rounding."""
    want = np.array(want)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4 * np.abs(want).max())


def per_head(ref, fn):
    return [[fn(ref.x[i][:, h], ref.g[i][:, h]) for h in range(H)] for i in range(L)]


def per_neuron(ref, fn):
    return [[fn(ref.a[i][:, j], ref.ga[i][:, j]) for j in range(F)] for i in range(L)]


def test_loss_and_context(both):
    found, _, ref = both
    same(found["loss"], ref.loss.item())
    same(found["context"], ref.x[0][PROMPT - 1].reshape(-1))


def test_heads(both):
    found, parity, ref = both
    n = len(TOKENS)
    wanted = {
        "l2_norm": lambda x, g: np.linalg.norm(x),
        "plainact": lambda x, g: np.abs((x * g).sum(1)).sum(),
        "fisher": lambda x, g: ((x * g).sum(1) ** 2).sum() / n,
        "grad_norm": lambda x, g: np.linalg.norm(g),
        "snip": lambda x, g: abs((x * g).sum()),
    }
    others = {"grasp", "nwot", "jacov", "epenas"}
    assert found["heads"].keys() == wanted.keys() | others == set(shadow_scores.FOR_HEADS)
    for name, fn in wanted.items():
        same(found["heads"][name], per_head(ref, fn))
    same(parity["heads"]["fisher"], per_head(ref, lambda x, g: ((x * g) ** 2).mean(0).sum()))
    same(parity["heads"]["snip"], per_head(ref, lambda x, g: np.abs(g).sum()))
    same(
        found["heads"]["grasp"], [-(x * h).sum((0, 2)) for x, h in zip(ref.x, ref.hg, strict=True)]
    )


def test_heads_by_signs_and_correlations(both):
    found, parity, ref = both

    def nwot(x, g):
        s = (x > 0).astype(float)
        return np.linalg.slogdet(np.eye(len(s)) + s @ s.T + (1 - s) @ (1 - s).T)[1]

    def jacov(x, g):
        rows = PROMPT - 1 + (np.arange(2) * (len(TOKENS) - PROMPT) / 2).astype(int)
        v = np.abs(np.linalg.eigvals(np.corrcoef(g[rows])))
        return -np.sum(np.log(v + 1e-5) + 1 / (v + 1e-5))

    def classes(g):
        labels = TOKENS[PROMPT:]
        rows = g[PROMPT - 1 : -1]
        large = [c for c in np.unique(labels) if (labels == c).sum() >= 5]
        assert large
        return [np.log(np.abs(np.corrcoef(rows[labels == c])) + 1e-5).sum() for c in large]

    same(found["heads"]["nwot"], per_head(ref, nwot))
    same(parity["heads"]["nwot"], per_head(ref, lambda x, g: np.log((x <= 0).sum())))
    same(found["heads"]["jacov"], per_head(ref, jacov))
    same(found["heads"]["epenas"], per_head(ref, lambda x, g: np.abs(classes(g)).sum()))
    gaps = per_head(ref, lambda x, g: sum(abs(a - b) for a in classes(g) for b in classes(g)))
    same(parity["heads"]["epenas"], gaps)


def test_neurons(both):
    found, parity, ref = both
    n = len(TOKENS)
    wanted = {
        "l2_norm": lambda a, g: np.linalg.norm(a),
        "act_grad": lambda a, g: np.abs(a * g).sum(),
        "fisher": lambda a, g: ((a * g) ** 2).sum() / n,
        "snip": lambda a, g: abs((a * g).sum()),
        "nwot": lambda a, g: np.log1p((a > 0).sum()) + np.log1p((a <= 0).sum()),
    }
    others = {"grasp", "plainact", "grad_norm"}
    assert found["neurons"].keys() == wanted.keys() | others == set(shadow_scores.FOR_NEURONS)
    for name, fn in wanted.items():
        same(found["neurons"][name], per_neuron(ref, fn))
    grasp = [-(a * h).sum(0) for a, h in zip(ref.a, ref.hga, strict=True)]
    same(found["neurons"]["grasp"], grasp)
    same(parity["neurons"]["snip"], per_neuron(ref, lambda a, g: np.abs(g).sum()))
    same(parity["neurons"]["fisher"], per_neuron(ref, lambda a, g: ((a * g) ** 2).sum() / n))
    share = per_neuron(ref, lambda a, g: np.log(max((a <= 0).sum(), 0.5) / n))
    same(parity["neurons"]["nwot"], share)
    dims = {"w_gate": 1, "w_up": 1, "w_down": 2}
    plain = {m: np.abs(ref.W[m] * ref.G[m]).sum(dims[m]) for m in ref.W}
    same(found["neurons"]["plainact"], sum(plain.values()))
    same(parity["neurons"]["plainact"], plain["w_gate" if "w_gate" in plain else "w_up"])
    squares = sum((ref.G[m] ** 2).sum(dims[m]) for m in ref.G)
    same(found["neurons"]["grad_norm"], np.sqrt(squares))
