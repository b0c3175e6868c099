"""Every key that `python -m launch.train` reads, with its meaning; the others start from here."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Defaults; `model.source` has none and must be given."""
    return ConfigDict(
        {
            "model": {
                # Model folder, .gguf file or hub id. In a dry run also preset:NAME, sizes alone.
                "source": "",
                # Of the parameters at rest (and so of the optimizer's arithmetic on them).
                "dtype": "float32",
                # Named sizes to plan with where the source is not on this machine.
                "preset": "",
                # With a preset, the mixture of experts to plan for; 0 for a dense model.
                "experts": 0,
                "top_k": 0,
            },
            "data": {
                # "stdlib", a .jsonl, .jsonl.gz or .parquet file, or a hub data set (owner/name).
                "source": "stdlib",
                "split": "train",
                "limit": 0,  # most rows read, 0 for all
                "seq_len": 128,
                # Conversations longer than seq_len: "split" over rows (no token is lost),
                # "truncate", "drop" or "error".
                "on_long": "split",
                "heldout_share": 0.15,
                "num_heldout": 64,  # most held-out conversations that are evaluated
                "seed": 0,  # order of the conversations and of the batches
            },
            "train": {
                # One of the two; an epoch is one pass over the packed rows.
                "steps": 0,
                "epochs": 0.0,
                "batch_size": 4,  # packed rows per update
                "accumulation": 1,  # microbatches per update
                "accumulation_dtype": "float32",  # of the sum of their gradients
                "seed": 0,  # of the routers' noise
                "optimizer": "adafactor",  # or "adamw", "muon"
                "lr": 5e-5,
                "schedule": "linear",
                "warmup_share": 0.0,  # of all steps
                "clip_norm": 0.0,  # 0 leaves gradients alone
                "weight_decay": 0.0,
                # Patterns of parameter paths, comma-separated: * any text in a key, ** any keys.
                "no_decay": "",  # where weights do not decay, as "**/*norm/scale,**/b_*"
                "freeze": "",  # what is not trained, as "embed/**"
                "lr_scale": "",  # factors of lr, as "**/router/**=0.1,embed/**=0.5"
                "z_loss": 0.0,  # weight of mean (log Z)^2 of the vocabulary's softmax
                "max_skipped": 10,  # most steps in a row without a finite loss, which are skipped
                "log_every": 1,
                "save_every": 0,  # 0 saves at the end and on ctrl-C only
                "keep_last": 1,  # newest checkpoints kept
                "keep_every": 0,  # also every so manyth step, as for launch.wise
                "eval_every": 0,  # 0 evaluates at the end only
                "keep_best": False,  # the final model is that of the lowest held-out loss
                "hang_s": 900.0,  # a step that takes longer has all stacks dumped; 0 never
                "prefetch": 2,  # batches made ahead
            },
            "compute": {
                "dtype": "float32",
                # What is computed again in the backward pass: "nothing", "dots" (all but matrix
                # products: the fastest on a CPU and a GPU), "full" (whole blocks), "offload"
                # (blocks; inputs in host memory).
                "remat": "dots",
                "max_logit_mib": 256,  # float32 logits that exist at once, per device
                "moe_implementation": "",  # of moejax.ops.grouped_matmul, "" chooses
                "moe_strategy": "auto",  # how tokens travel to experts (moejax.moe.choose)
                # On TPUs: collectives beside arithmetic; False leaves it to LIBTPU_INIT_ARGS.
                "overlap": True,
            },
            # Devices per axis; they multiply to the number of devices. 0 chooses.
            "mesh": {
                "data": 0,  # copies of everything
                "fsdp": 0,  # state split, weights gathered at use
                "expert": 0,  # experts split, tokens travel
                "tensor": 0,  # widths split, results summed
                "sequence": 1,  # rows split along their length: not done, more is refused
            },
            "save": {
                "format": "",  # "hf" or "orbax"; "" is hf for a dense model, orbax for an MoE
                "dtype": "keep",
            },
        }
    )
