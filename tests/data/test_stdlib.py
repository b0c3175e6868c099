"""The standard-library corpus: what is taken, what is held out, what counts as a duplicate."""

from __future__ import annotations

import ast
import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.core.errors import InputError
from moejax.data.duplicates import drop_near_duplicates
from moejax.data.load import DataConfig, load_data
from moejax.data.stdlib import (
    INSTRUCTION,
    Corpus,
    StdlibConfig,
    heldout_packages,
    load_corpus,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def code_of(text: str) -> str:
    return text.split("```python\n")[1].removesuffix("\n```")


def test_enough_of_it_and_split_by_package(corpus):
    train = {p.package for p in corpus.train}
    heldout = {p.package for p in corpus.heldout}
    assert len(corpus.train) > 300 and len(corpus.heldout) > 40
    assert not train & heldout and len(heldout) > 5
    share = len(corpus.heldout) / (len(corpus.train) + len(corpus.heldout))
    assert 0.10 < share <= 0.15


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of the library itself
def test_every_pair_is_a_function_and_its_signature(corpus):
    for pair in corpus.train + corpus.heldout:
        assert pair.prompt.startswith(INSTRUCTION)
        assert len(pair.prompt) + len(pair.answer) <= StdlibConfig().max_chars
        (question,) = ast.parse(code_of(pair.prompt)).body
        (answer,) = ast.parse(code_of(pair.answer)).body
        assert isinstance(question, ast.FunctionDef) and isinstance(answer, ast.FunctionDef)
        assert ast.get_docstring(question) and not ast.get_docstring(answer)
        assert ast.dump(question.args) == ast.dump(answer.args)
        assert pair.id.endswith(f":{answer.name}")
        assert "/test/" not in pair.id and "/tests/" not in pair.id


def test_the_seed_only_reorders(corpus):
    other = load_corpus(StdlibConfig(seed=1))
    assert other.sha256 == corpus.sha256
    assert other.train != corpus.train
    assert sorted(p.id for p in other.train) == sorted(p.id for p in corpus.train)
    assert json.loads(json.dumps(corpus.summary())) == corpus.summary()


def test_load_data_reads_the_same_again_and_passes_its_settings_on(corpus):
    data = load_data(DataConfig(num_heldout=8))
    assert [r.id for r in data.train] == [p.id for p in corpus.train]
    assert [r.id for r in data.heldout] == [p.id for p in corpus.heldout[:8]]
    assert data.summary["sha256"] == corpus.sha256


SOURCE = '''
import os

@staticmethod
def good(a, b=2):
    """Add two numbers here.

    More that is not shown.
    """

    # a comment that stays
    total = a + b
    return total

def stub(a):
    """Has a docstring but no work at all."""
    raise NotImplementedError(f"a message that is long enough: {a}")

def undocumented(a):
    return a + 1 + 2 + 3 + 4 + 5 + 6

def squeezed(a): "Three words here"; return a + 1 + 2 + 3 + 4 + 5

def brief(a):
    """Too short."""
    return a + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9

class Thing:
    def method(self):
        """A method is not taken."""
        return self.a + self.b + self.c + self.d
'''


def test_what_is_taken_of_a_file(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "mod.py").write_text(SOURCE)
    corpus = load_corpus(root=tmp_path)
    (pair,) = corpus.train
    assert (pair.id, pair.package) == ("mod.py:5:good", "mod")
    assert code_of(pair.prompt) == textwrap.dedent('''\
        @staticmethod
        def good(a, b=2):
            """Add two numbers here."""''')
    assert code_of(pair.answer) == textwrap.dedent("""\
        @staticmethod
        def good(a, b=2):
            # a comment that stays
            total = a + b
            return total""")


def test_a_library_without_sources(tmp_path):
    with pytest.raises(InputError, match="holds no Python function with a docstring"):
        load_corpus(root=tmp_path)


@pytest.mark.parametrize("wrong", ({"heldout_share": 1.5}, {"max_chars": 10}))
def test_impossible_settings(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        StdlibConfig(**wrong)


@given(st.dictionaries(st.text(max_size=4), st.integers(1, 50), max_size=20), st.floats(0.01, 0.9))
def test_held_out_packages_never_exceed_their_share(sizes, share):
    packages = [name for name, size in sizes.items() for _ in range(size)]
    held = heldout_packages(packages, share)
    assert sum(sizes[name] for name in held) <= share * len(packages)
    assert held == heldout_packages(packages[::-1], share)


def kept(*bodies: str) -> list[int]:
    functions = [ast.parse(f"def f(x, y):\n{textwrap.indent(b, '    ')}").body[0] for b in bodies]
    return drop_near_duplicates(list(enumerate(functions)))


LOOP = "total = 0\nfor a in x:\n    total += len(a)\nreturn total"
PRINTS = [f"print(x, {i}, y, 'some text {i}')" for i in range(12)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (LOOP, "n = 0\nfor item in x:\n    n += len(item)\nreturn n", True),  # variables renamed
        ("\n".join(PRINTS), "\n".join(PRINTS[:-1]), True),  # one line less
        ("'''Doc one.'''\nreturn x.lower()", "'''Two.'''\nreturn y.lower()", True),
        ("return os.path.join(x, y)", "return os.path.split(x)", False),
        ("return x.lower()", "return x.upper()", False),  # attributes are what it does
        ("return len(x)", "return sum(x)", False),  # and so are builtins
        (LOOP, "while x:\n    y.append(x.pop())\nreturn y", False),
    ],
)
def test_near_duplicates(one, other, same):
    functions = [
        ast.parse(f"def f(x, y):\n{textwrap.indent(b, '    ')}").body[0] for b in (one, other)
    ]
    assert drop_near_duplicates(list(enumerate(functions))) == ([0] if same else [0, 1])
