"""What every command does with a mistake: one line that names it, exit code 2."""

import functools

import pytest

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
