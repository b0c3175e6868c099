"""What every command does with a mistake: one line that names it, exit code 2."""

import functools

import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from launch import cli
from moejax.core.errors import InputError
from tests import commands

SFT = "--config=configs/quickstart_sft.py"
run = functools.partial(commands.run, "train")


@pytest.mark.parametrize(
    "args,message",
    [
        ([], "--config is missing"),
        (["--config=configs/nope.py"], "configs/nope.py: no such file"),
        ([SFT, "--config.train.lrr=3"], "no such key (did you mean train.lr?); its keys: compute."),
        ([SFT, "--config.train.lr=abc"], "could not convert string to float: 'abc'"),
        (["--config=configs/xft_deepseek_1b.py:foo"], "stage 'foo' is not one of sft, moe, merge"),
        (["--confg=1"], "Unknown command line flag 'confg'"),
        (["extra"], "unexpected argument 'extra'"),
        ([SFT, "--workdir=gs://b/run"], "--workdir=gs://b/run: gs:// names no file here: mount"),
    ],
)
def test_a_mistake_is_one_line(args, message):
    done = run(*args)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr


def test_help_tells_the_command_and_its_flags():
    done = run("--help")
    for text in ("Supervised fine-tuning", "--workdir", "--[no]dry_run", "--compile_cache"):
        assert text in done.stdout


@pytest.mark.parametrize("value", ["gs://b/a", "runs/a,gs://b/a", "law=hdfs://b/a"])
def test_a_place_elsewhere_is_refused_in_lists_too_and_text_for_a_model_is_not(value):
    given = flags.FlagValues()
    flags.DEFINE_list("models", [], "", flag_values=given)
    flags.DEFINE_multi_string("prompt", [], "", flag_values=given)
    given(["x", f"--prompt={value}", "--models=a/b,c=d,C:/e"])
    cli.refuse_remote(given)
    given(["x", f"--models={value}"])
    with pytest.raises(InputError, match="--models=.*:// names no file here: mount"):
        cli.refuse_remote(given)


def test_a_place_elsewhere_in_a_config_is_refused():
    given, config = flags.FlagValues(), base.get_config()
    config.model.source = "s3://b/m"
    config_flags.DEFINE_config_dict("config", config, flag_values=given)
    given(["x"])
    with pytest.raises(InputError, match="--config.model.source=s3://b/m: s3:// names no file"):
        cli.refuse_remote(given)
