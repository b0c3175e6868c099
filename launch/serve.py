"""Serves a model to clients of OpenAI's API.

  python -m launch.serve --model=MODEL
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "NAME", "messages": [{"role": "user", "content": "Name three birds."}]}'

MODEL is a model folder, a .gguf file or a hub id; NAME is its last part unless --served_name says
otherwise. Any OpenAI client works with base_url="http://localhost:8000/v1", and so do harnesses
that speak to one: completions (echo, logprobs, n, stop, seed), chat completions (streamed too),
models. --adapters=NAME=DIR,... lays deltas of launch.esft over MODEL for calls that say
"adapter": "NAME", or that name one as their model. --bridges=NAME=DIR,... joins sources to MODEL by
bridges of launch.graft (DIR: a run's folder `bridge`); a call's "sources": ["NAME"] says who lends,
[] that nobody does. --shadow=DIR (RUN/predictor_token of launch.shadow) skips the heads and neurons
that a token needs least, --sparsity of them; a call's "sparsity": 0.3 says its own share, 0 asks
for the dense model, and /health tells what the audit has seen. Requests share the model's slots; a
client that hangs up frees its own. The server listens on this machine only unless --host says
otherwise; then give --api_key_file.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli
from launch.graft_lenders import read_grafted
from launch.mesh_text import parse_mesh
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import lineage
from moejax.io.load import Loaded, load_any
from moejax.io.sharded import on_mesh
from moejax.methods import adapter_files, esft_delta, shadow_predictor
from moejax.methods.esft_delta import Delta
from moejax.methods.shadow_audit import Audit, AuditConfig
from moejax.methods.shadow_decode import check_plan
from moejax.methods.shadow_mask import check_sparsity
from moejax.models.transformer import ForwardOptions
from moejax.serve.prepare import context_length
from moejax.serve.request import EngineConfig
from moejax.serve.sparse import Policy, Sparse, check_interval, ready

MODEL = flags.DEFINE_string("model", None, "Model folder, .gguf file or hub id.")
SERVED_NAME = flags.DEFINE_string("served_name", None, "Name in the API; None: MODEL's last part.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
API_KEY_FILE = flags.DEFINE_string("api_key_file", None, "File with the key clients must send.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of weights, arithmetic and cache."
)
ADAPTERS = flags.DEFINE_list("adapters", [], "Deltas that calls can name, as law=DIR,code=DIR.")
BRIDGES = flags.DEFINE_list("bridges", [], "Bridges to sources, as maths=DIR,law=DIR.")
SHADOW = flags.DEFINE_string("shadow", None, "Folder of MODEL's predictor: RUN/predictor_token.")
SPARSITY = flags.DEFINE_float("sparsity", 0.5, "--shadow: heads and neurons skipped, [0, 1).")
REFRESH_EVERY = flags.DEFINE_integer(
    "refresh_every", 0, "--shadow: RUN/predictor decides anew after so many tokens; 0: once.", 0
)
AUDIT_SHARE = flags.DEFINE_float("audit_share", 0.01, "--shadow: answers also read by the dense.")
AUDIT_LIMIT = flags.DEFINE_float(
    "audit_limit", 0.5, "--shadow: drift, nats per token, past which all answers are dense."
)
MESH = flags.DEFINE_string("mesh", None, "Devices to split over, as tensor=4 or fsdp=2,tensor=2.")
NUM_SLOTS = flags.DEFINE_integer("num_slots", 8, "Answers decoded together.", 1)
MAX_LENGTH = flags.DEFINE_integer(
    "max_length", 4096, "Most tokens of prompt and answer; never more than the model reads.", 2
)
NUM_PAGES = flags.DEFINE_integer(
    "num_pages", None, "Pages of the cache; None: enough for all slots at max_length."
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Most tokens of one answer; None: what fits.")
MAX_OPEN = flags.DEFINE_integer(
    "max_open", 128, "Answers waiting or under way; beyond them clients get a 429.", 1
)
MAX_BODY_KB = flags.DEFINE_integer("max_body_kb", 1024, "Largest request, in kB.", 1)

MAX_LOGPROBS = 20
_SHADOWS = ("sparsity", "refresh_every", "audit_share", "audit_limit")


def main(argv: Sequence[str]) -> None:
    del argv
    if MODEL.value is None:
        raise InputError("--model is missing: name a model folder, a .gguf file or a hub id")
    place = on_mesh(parse_mesh(MESH.value)) if MESH.value else None
    if BRIDGES.value and (ADAPTERS.value or MESH.value):
        raise InputError("--bridges goes with neither --adapters nor --mesh: leave those out")
    audit = _read_audit()
    key = _read_key()
    if cli.DRY_RUN.value:
        _show_plan(load_any(MODEL.value, abstract=True))
        return
    # Before the model is read: a port that is taken should not cost that time.
    with _listen() as listener:
        # A delta knows its base by the stored weights' hash, a predictor its model by that of
        # float32; the engine then makes them DTYPE.
        dtype = "keep" if ADAPTERS.value else "float32" if SHADOW.value else DTYPE.value
        loaded = load_any(MODEL.value, dtype, place=place)
        if loaded.tokenizer is None:
            raise InputError(f"{MODEL.value} has no tokenizer: texts cannot be read")
        _serve(loaded, listener, key, audit)


def _read_audit() -> Audit:
    """That of --audit_share; InputError for flags of --shadow that are wrong or go with nothing."""
    given = [name for name in _SHADOWS if flags.FLAGS[name].present]
    if given and not SHADOW.value:
        raise InputError(f"--{given[0]} needs --shadow: name the folder of MODEL's predictor")
    if SHADOW.value and (BRIDGES.value or ADAPTERS.value or MESH.value):
        raise InputError("--shadow goes with none of --bridges, --adapters, --mesh: leave them out")
    check_sparsity(SPARSITY.value)
    return Audit(AuditConfig(AUDIT_SHARE.value, AUDIT_LIMIT.value))


def _read_key() -> str | None:
    if API_KEY_FILE.value is None:
        return None
    key = Path(API_KEY_FILE.value).read_text(encoding="utf-8").strip()
    if not key:
        raise InputError(f"--api_key_file={API_KEY_FILE.value} is empty: write a key into it")
    return key


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in HOST.value else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST.value, PORT.value))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(f"--host={HOST.value} --port={PORT.value}: {error.strerror}") from None
    return listener


def _settings(loaded: Loaded) -> EngineConfig:
    return EngineConfig(
        num_slots=NUM_SLOTS.value,
        max_length=min(MAX_LENGTH.value, context_length(loaded.config)),
        num_pages=NUM_PAGES.value,
        max_logprobs=min(MAX_LOGPROBS, loaded.config.vocab_size),
        max_stop_ids=max(8, len(loaded.tokenizer.eos_ids) if loaded.tokenizer else 0),
        options=ForwardOptions(compute_dtype=DTYPE.value),
    )


def _read_adapters(loaded: Loaded) -> dict[str, Delta]:
    """Name -> delta of --adapters, each checked against the model in memory."""
    found: dict[str, Delta] = {}
    base = lineage.hash_params(loaded.params) if ADAPTERS.value else ""
    for item in ADAPTERS.value:
        name, _, folder = item.partition("=")
        if not name or not folder or name in found or name == _name():
            raise InputError(
                f"--adapters: {item!r} must be NAME=DIR, each NAME once and none {_name()!r}, "
                "which is the model's"
            )
        found[name] = adapter_files.read(folder, loaded.config)
        esft_delta.check_hash(base, found[name], folder)
    return found


def _read_sparse(loaded: Loaded) -> Sparse:
    """The model laid out by the predictor of --shadow, which must be of these very weights."""
    predictor = shadow_predictor.load(
        str(SHADOW.value), loaded.config, lineage.hash_params(loaded.params)
    )
    share = SPARSITY.value
    policy = Policy(predictor.info.sizes, (share, share), REFRESH_EVERY.value)
    return ready(loaded.params, loaded.config, predictor, policy)


def _name() -> str:
    source = str(MODEL.value)
    return SERVED_NAME.value or Path(source).name.removesuffix(".gguf") or source


def _serve(loaded: Loaded, listener: socket.socket, key: str | None, audit: Audit) -> None:
    import uvicorn  # --help and --dry_run should not wait for it

    from moejax.serve.engine import Engine
    from moejax.serve.grafted_engine import GraftedEngine
    from moejax.serve.http import ServerConfig, make_app
    from moejax.serve.shadow_engine import ShadowEngine
    from moejax.serve.worker import EngineWorker

    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    engine: Engine | GraftedEngine
    if BRIDGES.value and MODEL.value:
        model = read_grafted(MODEL.value, loaded.params, BRIDGES.value, DTYPE.value)
        engine = GraftedEngine(model, _settings(loaded), tokenizer.decode)
    elif SHADOW.value:
        engine = ShadowEngine(_read_sparse(loaded), _settings(loaded), tokenizer.decode, audit)
    else:
        deltas = _read_adapters(loaded)
        engine = Engine(loaded.params, loaded.config, _settings(loaded), tokenizer.decode, deltas)
    loaded = dataclasses.replace(loaded, params=None)  # the engine has its own layout
    started = time.perf_counter()
    print(f"compiling for {engine.settings.num_slots} slots ...", file=sys.stderr, flush=True)
    engine.warm()
    host, port = listener.getsockname()[:2]
    print(
        f"{_name()} at http://{host}:{port}/v1 (compiled in {time.perf_counter() - started:.0f} s; "
        "ctrl-C ends it)",
        file=sys.stderr,
        flush=True,
    )
    config = ServerConfig(
        _name(),
        max_body_bytes=MAX_BODY_KB.value * 1024,
        max_open=MAX_OPEN.value,
        max_tokens=MAX_TOKENS.value,
        api_key=key,
    )
    app = make_app(EngineWorker(engine), tokenizer, config)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=5, lifespan="on")
    )
    server.run(sockets=[listener])


def _show_plan(loaded: Loaded) -> None:
    """Prints what would be served and what it takes."""
    config, settings, skips = loaded.config, _settings(loaded), ""
    if SHADOW.value:
        predictor = shadow_predictor.load(str(SHADOW.value), config)
        sizes = predictor.info.sizes
        check_plan(config, sizes)
        check_interval(predictor, REFRESH_EVERY.value)
        skips = (
            f"shadow   {SPARSITY.value:.0%} of {sizes.heads} heads by {sizes.unit} and of "
            f"{sizes.blocks} blocks of {sizes.block} neurons, after layer {sizes.first - 1}\n"
        )
    itemsize = 4 if DTYPE.value == "float32" else 2
    kept = sum(heads * size for heads, size in config.cache_shapes)
    per_token = config.num_layers * kept * itemsize
    num_params = tree.num_params(loaded.params)
    assert settings.max_length is not None
    print(
        f"model    {_name()}: {config.family}, {config.num_layers} layers, width {config.d_model}\n"
        f"weights  {num_params:,} in {DTYPE.value}, {num_params * itemsize / 1e9:.3f} GB, "
        "twice that while they are laid out\n"
        f"cache    {per_token / 1e3:.1f} kB a token; {settings.num_slots} slots of up to "
        f"{settings.max_length} tokens: "
        + (
            f"{settings.num_pages} pages\n"
            if settings.num_pages
            else f"{settings.num_slots * settings.max_length * per_token / 1e9:.3f} GB\n"
        )
        + skips
        + f"address  http://{HOST.value}:{PORT.value}/v1, "
        + ("a key is wanted\n" if API_KEY_FILE.value else "no key\n")
        + "dry run: nothing served"
    )


if __name__ == "__main__":
    cli.run(main)
