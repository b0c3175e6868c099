"""Bridges on disk for a target that is served or generates: NAME=DIR, several at once."""

from __future__ import annotations

from collections.abc import Sequence

from configs import graft as graft_config
from launch.graft_loss import BRIDGED
from launch.graft_setup import Setup, load_bridge, make_setup
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.io.load import find_source
from moejax.models.transformer import ForwardOptions
from moejax.serve.grafted import Grafted, Lender
from moejax.serve.prepare import prepare


def read_grafted(target: str, params, items: Sequence[str], dtype: str) -> Grafted:
    """The target `params` with the bridges of NAME=DIR items, and their sources.

    Errors: InputError for a malformed or repeated item, a folder without a bridge, a bridge for
    another target (by hash), or with a source that is not where it was or is another one.
    """
    lenders: dict[str, Lender] = {}
    config = None
    for item in items:
        name, _, folder = item.partition("=")
        if not name or not folder or name in lenders:
            raise InputError(f"--bridges: {item!r} must be NAME=DIR, each NAME once")
        setup = setup_of(target, folder, dtype)
        if setup.joined.paper:
            raise InputError(f"{folder} is a bridge in paper mode, which cannot generate")
        bridge = load_bridge(setup, find_source(folder))
        weights = prepare(setup.source_params(), dtype)
        lenders[name] = Lender(setup.source.config, weights, setup.graft, bridge, setup.joined)
        config = setup.target.config
    if config is None:
        raise InputError("--bridges is empty: give NAME=DIR, DIR a bridge of launch.graft")
    return Grafted(config, prepare(params, dtype), lenders, ForwardOptions(dtype))


def setup_of(target: str, folder: str, dtype: str) -> Setup:
    """The two models of a bridge as they were trained, by what its bridge.json says."""
    path = find_source(folder) / "bridge.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no bridge: name a launch.graft run's folder `bridge`")
    told = atomic.read_json(path)
    if told["method"] not in BRIDGED:
        raise InputError(f"{folder} was trained by method {told['method']!r}: it is no bridge")
    config = graft_config.get_config()
    config.source.model, config.target.model = told["source"]["path"], target
    config.source.dtype = config.compute.dtype = dtype
    graft = told["graft"]
    config.source.layers = tuple(graft["taps"])
    names = ("placement", "every", "num_heads", "bottleneck", "gate", "start", "distance_bias")
    config.bridge.update({name: graft[name] for name in names})
    config.bridge.update(alignment=told["alignment"], prefix=told["prefix"])
    config.method = told["method"]
    config.data.update(target_len=2, source_len=2)
    return make_setup(config)
