"""From a generator's ids to records and Pass@1: with stand-ins that answer by heart."""

import json
import re

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.evals import bootstrap, scores
from moejax.evals.run import (
    Question,
    RunConfig,
    answer_fn,
    encode_prompt,
    grade,
    grade_samples,
    run,
)
from moejax.evals.sandbox import Limits
from moejax.evals.tasks import Grading, load_items
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.transformer import init_params
from moejax.serve.generate import Completion, GenerateConfig
from moejax.serve.sampling import SamplingConfig
from tests.tiny_tokenizer import gguf_fields

TASKS = load_items(FUNCTIONS, limit=6)
RUN = Grading(allow_code_execution=True)
ALLOWED = RunConfig(grading=RUN, chunk_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf_metadata(gguf_fields())


class Student:
    """Answers with the reference where `knows(task id, sample)`; remembers what it was asked."""

    def __init__(self, tokenizer, knows):
        self.tokenizer, self.knows, self.asked = tokenizer, knows, []

    def __call__(self, questions, longest):
        assert longest >= max(len(question.ids) for question in questions)
        for place, question in list(enumerate(questions))[::-1]:  # in any order
            text = self.tokenizer.decode(question.ids, skip_special=False)
            task = next(task for task in TASKS if f"function {task.row['signature']} that" in text)
            for sample in range(question.num_samples):
                self.asked.append(question.index + sample)
                right = self.knows(task.id, question.index + sample)
                answer = task.row["solution" if right else "mutant"]
                if text.endswith(":\n"):  # the answer's start was given
                    answer = answer.split(":\n", 1)[1] + "```"
                yield place, sample, Completion(self.tokenizer.encode(answer), True)


@pytest.mark.parametrize("form", ["chat", "fence"])
def test_known_tasks_pass_and_others_do_not(tokenizer, form):
    student = Student(tokenizer, lambda task, _: task in {"add", "square"})
    config = RunConfig(form, grading=RUN)
    records = run(student, tokenizer, FUNCTIONS, TASKS, config)
    assert [record["id"] for record in records] == [task.id for task in TASKS]
    assert {r["id"] for r in records if r["passed"]} == {"add", "square"}
    assert {r["verdict"] for r in records if not r["passed"]} == {"wrong"}
    assert json.loads(json.dumps(records)) == records
    first = records[0]
    assert first["form"] == form and "add(a, b)" in first["prompt"] and first["finished"]
    assert first["extracted"] == "def add(a, b):\n    return a + b\n"
    summary = scores.summary(records)
    assert summary["pass_at_1"] == pytest.approx(2 / 6)
    wilson = bootstrap.wilson(2, 6)
    assert summary["pass_at_1_interval"] == [wilson.low, wilson.high]
    assert summary["verdicts"] == {"pass": 2, "wrong": 4}


def test_nothing_is_generated_without_permission(tokenizer):
    student = Student(tokenizer, lambda *_: True)
    with pytest.raises(InputError, match="allow_code_execution"):
        run(student, tokenizer, FUNCTIONS, TASKS, RunConfig())
    assert student.asked == []


def test_a_run_cut_off_and_resumed_equals_the_run_never_cut(tokenizer):
    def knows(task, index):
        return task == "add" or index % 2 == 0

    config = RunConfig(num_samples=3, chunk_size=4, grading=RUN)
    student, seen = Student(tokenizer, knows), []
    whole = run(student, tokenizer, FUNCTIONS, TASKS, config, on_records=seen.append)
    assert sorted(student.asked) == list(range(18)) and [len(s) for s in seen] == [4] * 4 + [2]
    assert [(r["id"], r["sample"]) for r in whole][:4] == [
        ("add", 0), ("add", 1), ("add", 2), (TASKS[1].id, 0)]  # fmt: skip
    kept = [*whole[:4], whole[7], whole[17]]
    resumed, seen = Student(tokenizer, knows), []
    again = run(resumed, tokenizer, FUNCTIONS, TASKS, config, done=kept, on_records=seen.append)
    assert sorted(resumed.asked) == [4, 5, 6, *range(8, 17)] and seen[0] == kept

    def timeless(records):
        return [{k: v for k, v in r.items() if not k.endswith("_s")} for r in records]

    assert timeless(again) == timeless(whole)
    silent = Student(tokenizer, knows)
    assert run(silent, tokenizer, FUNCTIONS, TASKS, config, done=whole) == whole
    assert silent.asked == []


def test_the_engine_answers_what_is_left_as_if_it_were_asked_all(tokenizer):
    """Sampled answers of a real, tiny model, with stop strings: the same bits after a stop."""
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=512)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    drawing = GenerateConfig(8, SamplingConfig(1.0), seed=3, batch_size=4)
    answer = answer_fn(params, config, tokenizer, drawing)
    items = TASKS[:3]
    asked = RunConfig(num_samples=3, grading=RUN)
    whole = run(answer, tokenizer, FUNCTIONS, items, asked)
    again = run(answer, tokenizer, FUNCTIONS, items, asked, done=[whole[1], whole[5]])
    assert [r["completion"] for r in again] == [r["completion"] for r in whole]
    assert len({record["completion"] for record in whole}) == 9
    stop = whole[4]["completion"][2:4]
    (ids,) = [tuple(encode_prompt(tokenizer, FUNCTIONS.forms["chat"](items[1])))]
    ((_, _, ended),) = answer([Question(ids, (stop,), 4)], max(len(ids), 64))
    text = whole[4]["completion"]
    assert ended.finished and ended.text == text[: text.find(stop)]


def test_several_samples_give_pass_at_k(tokenizer):
    def knows(task, index):
        return task == "add" or (task == "square" and index % 2)

    config = RunConfig(num_samples=2, chunk_size=6, grading=RUN)
    records = run(Student(tokenizer, knows), tokenizer, FUNCTIONS, TASKS, config)
    summary = scores.summary(records, ks=(1, 2))
    assert summary["pass_at_1"] == pytest.approx(3 / 12)
    assert summary["pass_at_k"] == pytest.approx({"1": 3 / 12, "2": 2 / 6})
    assert (summary["pass_at_1_n"], summary["num_answers"]) == (6, 12)
    with pytest.raises(InputError, match="k = 3 needs as many samples; 'add' has 2"):
        scores.summary(records, ks=(3,))


def sample(completion: str, task: str = "add") -> dict:
    return {"id": task, "sample": 0, "completion": completion}


@pytest.mark.parametrize(
    ("body", "verdict", "reason"),
    [
        ("return a + b", "pass", ""),
        ("return a - b", "wrong", r"test 1: add\(1, 2\) is -1, not 3"),
        ("return a + b if a < 10**12 else 0", "wrong", "test 5"),
        ("return c", "error", "test 1.*NameError"),
        ("raise ValueError('\\ud800')", "error", r"ValueError: \?"),
        ("return lambda: 3", "error", "not plain data"),
        ("import os; os._exit(0)", "error", "ended after 0 of 5 calls"),
        ("import sys; sys.exit(0)", "error", "SystemExit"),
        ("while True: pass", "timeout", "longer than 1 s"),
        ("print('x' * 10**8)", "output", "more than"),
        ("import ctypes; ctypes.string_at(0)", "crash", "SIGSEGV"),
    ],
)
def test_verdicts(body, verdict, reason):
    config = RunConfig(grading=Grading(Limits(wall_s=1.0), allow_code_execution=True))
    (record,) = grade([sample(f"def add(a, b):\n    {body}")], FUNCTIONS, TASKS, config)
    assert record["verdict"] == verdict and record["passed"] == (verdict == "pass")
    assert re.search(reason, record["reason"]), record["reason"]
    json.dumps(record, ensure_ascii=False).encode()


def test_a_reply_without_the_function_is_counted_as_such():
    (record,) = grade([sample("I would rather not.")], FUNCTIONS, TASKS, ALLOWED)
    assert (record["verdict"], record["passed"], record["extracted"]) == ("no program", False, "")


def test_the_form_with_more_passes_is_chosen_and_the_first_of_equals():
    def rows(num_passed):
        return [{"passed": i < num_passed} for i in range(5)]

    assert scores.choose_form({"chat": rows(1), "fence": rows(3)}) == "fence"
    assert scores.choose_form({"chat": rows(2), "fence": rows(2)}) == "chat"


def records_of(passed) -> list[dict]:
    word = {True: "pass", False: "wrong"}
    return [
        {"id": str(i), "sample": 0, "passed": bool(p), "verdict": word[bool(p)]}
        for i, p in enumerate(passed)
    ]


def test_differences_are_paired_by_task():
    rng = np.random.default_rng(0)
    a, b = rng.random(30) < 0.6, rng.random(30) < 0.5
    shuffled = [records_of(b)[i] for i in rng.permutation(30)]
    assert scores.minus(records_of(a), shuffled) == bootstrap.paired_share(a, b)
    with pytest.raises(ValueError, match="not the same"):
        scores.minus(records_of(a), records_of(b)[:-1])
    twice = [{**r, "sample": s} for r in records_of(a) for s in (0, 1)]
    assert scores.minus(twice, records_of(b)).mean == pytest.approx(a.mean() - b.mean())


def test_samples_made_elsewhere_are_run_once():
    samples = [
        sample(f"def add(a, b): return a {op} b") | {"sample": i} for i, op in enumerate("+-")
    ]
    seen: list[int] = []
    records = grade_samples(
        samples, FUNCTIONS, TASKS, ALLOWED, on_records=lambda new: seen.append(len(new))
    )
    assert [record["verdict"] for record in records] == ["pass", "wrong"] and seen == [2]
    assert records[0]["prompt"].startswith("Write a Python function add(a, b)")
    other = {**samples[1], "completion": "def add(a, b): return b + a"}
    again = grade_samples([samples[0], other], FUNCTIONS, TASKS, ALLOWED, done=records)
    assert again[0] == records[0] and again[1]["verdict"] == "pass"


def test_what_cannot_be_scored_counts_neither_way():
    records = [*records_of([True, False]), {"id": "x", "verdict": "unscored", "passed": None}]
    summary = scores.summary(records)
    assert (summary["pass_at_1"], summary["pass_at_1_n"]) == (0.5, 2)
    assert summary["verdicts"]["unscored"] == 1
    assert scores.summary(records[2:])["pass_at_1"] is None


def test_two_models_are_compared_by_task():
    a, b = records_of([1, 1, 1, 1, 0, 1, 1, 1]), records_of([0, 0, 0, 0, 0, 0, 0, 1])
    found = scores.compare(a, b)
    assert found["difference"] == 6 / 8 and found["verdict"] == "better"
    assert found["p_sign"] == pytest.approx(2 / 2**6) == found["p_flip"]
    with pytest.raises(ValueError, match="not the same"):
        scores.compare(a, b[:-1])


def test_votes_and_scores_are_summed_up():
    rows = [("1", True), ("1", True), ("2", False)], [("3", False), (None, False), ("4", True)]
    records = [
        {"id": str(i), "sample": j, "answer": answer, "passed": passed, "score": float(j),
         "verdict": "pass" if passed else "wrong"}
        for i, group in enumerate(rows) for j, (answer, passed) in enumerate(group)
    ]  # fmt: skip
    summary = scores.summary(records, ks=(1, 3))
    assert summary["maj_at_k"]["3"] == pytest.approx((1 + 0.5) / 2)
    assert summary["best_at_k"]["3"] == pytest.approx((0 + 1) / 2)
    assert summary["unique_answers"] == pytest.approx((2 / 3 + 1) / 2)
    assert summary["pass_at_k"]["3"] == 1.0 and "bias_of_pass_at_1" in summary
