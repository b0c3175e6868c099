"""LLM Modules: a frozen large model lends its knowledge to a small one (arXiv 2502.08213).

    python -m launch.graft --stage=cache    --config=configs/graft.py --workdir=runs/graft \\
        --config.source.model=LARGE --config.target.model=SMALL --config.data.path=texts.jsonl
    python -m launch.graft --stage=train    (the same flags)
    python -m launch.graft --stage=evaluate (the same flags)
    python -m launch.graft --stage=report   (the same flags)
    python -m launch.graft --stage=generate (the same flags) --prompt='User: Why?'

cache     runs the source once over all texts and keeps its states in WORKDIR/states
train     the bridge, and the target with it (--config.target.train); reads the states, or with
          --noconfig.cache.use runs the source in every step; WORKDIR/bridge, WORKDIR/target
evaluate  bits per byte of held-out answers: with the bridge, with it shut, with another text's
          states (is the knowledge used at all?), with every state in sight (the leak), of the
          target as it came, of the source alone; WORKDIR/evaluation.json
report    gates, attention maps, the effect of each layer of the bridge; WORKDIR/plots
generate  continues prompts, keys and values of all models kept; --bridges=NAME=DIR,... joins the
          target to several sources at once, --sources=NAME says who lends (default: all)

A run with --config.method=adapter, forward, reverse, gkd, hidden or shuffled trains a rival of the
bridge on as many parameters and texts. The two models may have different tokenizers:
configs/graft.py says what each key means. Only moejax loads a bridge: neither transformers nor vLLM
has its layer. One process, one device.
"""

from __future__ import annotations

import functools
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs import graft as graft_config
from launch import cli, graft_evaluate, graft_train
from launch.graft_lenders import read_grafted
from launch.graft_loss import check_method
from launch.graft_setup import BRIDGE, Setup, cache_states, check_bridge, load_examples, make_setup
from launch.settings import checked
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.grafting import stats
from moejax.io.load import load_any
from moejax.methods.graft import bridge_shapes
from moejax.serve.grafted import Grafted, generate_text
from moejax.serve.sampling import SamplingConfig

STAGES = ("cache", "train", "evaluate", "report", "generate")
STAGE = flags.DEFINE_enum("stage", None, STAGES, "What to do.")
CONFIG = config_flags.DEFINE_config_file("config", "configs/graft.py", "configs/graft.py or alike.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it is there.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a text to continue; may be repeated.")
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "generate: per answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "generate: 0 is greedy.", lower_bound=0)
BRIDGES = flags.DEFINE_list("bridges", [], "generate: bridges of other runs, as a=DIR,b=DIR.")
SOURCES = flags.DEFINE_list("sources", None, "generate: who lends, by name; None: all.")
SEED = flags.DEFINE_integer("seed", 0, "generate: of the draws.")


def main(argv) -> None:
    del argv
    if STAGE.value is None:
        raise InputError(f"--stage is missing: give one of {', '.join(STAGES)}")
    config = checked(CONFIG.value, graft_config.get_config())
    if STAGE.value == "generate" and BRIDGES.value:
        _generate_with_bridges(config)
        return
    setup = make_setup(config)
    say = functools.partial(print, flush=True)
    for line in describe(setup):
        say(line)
    if STAGE.value == "generate":
        _generate(setup)
        return
    train, heldout = load_examples(setup, say)
    for name, examples in (("train", train), ("held out", heldout)):
        found = stats(examples)
        say(f"{name:8} " + ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in found.items()))
    if STAGE.value == "train":
        check_method(setup)
        say(f"steps    {graft_train.num_steps(setup, len(train)):,}")
    tokens = sum(len(e.source_ids) for e in (*train, *heldout))
    size = tokens * setup.graft.read_size * (4 if setup.config.cache.dtype == "float32" else 2)
    say(f"states   {size / 1e9:.3f} GB in {setup.config.cache.dtype}")
    if cli.DRY_RUN.value:
        say("dry run: nothing trained, nothing written")
        return
    workdir = _workdir()
    examples = [*train, *heldout]
    if STAGE.value in ("evaluate", "report"):
        check_bridge(workdir / BRIDGE)  # before the source reads all texts for it
    if STAGE.value == "cache" or setup.config.cache.use:
        cache_states(setup, examples, workdir / "states", _progress(say))
    if STAGE.value == "train":
        graft_train.train(setup, train, heldout, workdir, say)
    elif STAGE.value == "evaluate":
        graft_evaluate.evaluate(setup, len(train), examples, workdir, say)
    elif STAGE.value == "report":
        graft_evaluate.report(setup, heldout, workdir, say)


def describe(setup: Setup) -> list[str]:
    """The plan in lines."""
    graft, b = setup.graft, setup.config.bridge
    bridge = sum(_size(shape) for shape in bridge_shapes(graft, setup.target.config).values())
    places = f"{graft.num_layers(setup.target.config)} layers {graft.placement}"
    places += f" every {graft.every} blocks" if graft.placement == "inside" else ""
    return [
        f"source   {setup.config.source.model}: {tree.num_params(setup.source.params):,} "
        f"parameters, frozen, layers {list(graft.taps)}",
        f"target   {setup.config.target.model}: {tree.num_params(setup.target.params):,} "
        f"parameters, trained: {setup.config.target.train}",
        f"bridge   {bridge:,} parameters, {places}, gate {graft.gate} {graft.start}; alignment "
        f"{setup.joined.how}{', source reads the prompt alone' if b.prefix else ''}"
        + ("; PAPER MODE: every token sees later text" if setup.joined.paper else ""),
    ]


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _workdir() -> Path:
    if WORKDIR.value is None:
        raise InputError("--workdir is missing: name the folder that the run is kept in")
    return Path(WORKDIR.value)


def _progress(say):
    """Says a line for every tenth of the texts."""
    said = [0]

    def show(done: int, total: int) -> None:
        if done * 10 // total > said[0]:
            said[0] = done * 10 // total
            say(f"states   {done} of {total} texts")

    return show


def _generate(setup: Setup) -> None:
    if not PROMPT.value:
        raise InputError("--prompt is missing: give a text to continue")
    if cli.DRY_RUN.value:
        print("dry run: nothing generated")
        return
    _continue(graft_train.load_pair(setup, _workdir()))


def _generate_with_bridges(config) -> None:
    """The target of the config with bridges of several runs, each to a source of its own."""
    if not PROMPT.value:
        raise InputError("--prompt is missing: give a text to continue")
    target, dtype = config.target.model, config.compute.dtype
    if not target:
        raise InputError("--config.target.model is missing: a folder, .gguf file or hub id")
    _continue(read_grafted(target, load_any(target, dtype).params, BRIDGES.value, dtype))


def _continue(model: Grafted) -> None:
    for prompt in PROMPT.value:
        sampling = SamplingConfig(TEMPERATURE.value)
        text = generate_text(
            model, prompt, NEW_TOKENS.value, sampling, SEED.value, SOURCES.value
        )
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(main)
