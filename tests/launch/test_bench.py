"""The bench as a user runs it: its table, its JSON, its errors."""

from __future__ import annotations

import functools
import json
import os
import time

import pytest
from rich.console import Console

from launch import bench_gpu, bench_row, bench_table, bench_tpu, bench_tpu_peers
from launch.bench_row import Row
from moejax.core.errors import InputError
from tests import commands

ROWS = [
    Row("cpu forward", 1.62, "x", ">= 1.5", 1.0, "grouped_mm", "paired, median of 7"),
    Row("tpu temp", 1553.25, "MB", "<= 700", 7270.0, "8x buffer", "compiled for v5p:2x2x2"),
    Row("h100 spills", None, "", how="not measured: libtpu is missing"),
]
run = functools.partial(commands.run, "bench")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite=speed"], "--suite=speed: choose one of kernels"),
        ([], "choose one of kernels"),
        (["--suite=kernels", "--only=("], "--only=(: not a regular expression"),
        (["--suite=kernels", "--out=no/such/folder/x.json"], "its folder does not exist"),
        (["--suite=kernels", "--only=no such figure"], "no figure of suite kernels matches"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, words):
    done = run(*flags)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and words in last
    assert "Traceback" not in done.stderr


def test_help_says_what_is_needed():
    done = run("--help")
    for words in ("--suite", "--peer", "--only", "--out", "tests/run --aot"):
        assert words in done.stdout


def test_brackets_in_a_reason_are_shown():
    console = Console(width=200)
    with console.capture() as captured:
        console.print(bench_table.table([Row("x", None, "", how="pip install -e .[aot]")]))
    assert "pip install -e .[aot]" in captured.get()


def test_the_table_is_aligned_and_says_what_was_reached():
    console = Console(width=200)
    with console.capture() as captured:
        console.print(bench_table.table(ROWS))
    head, *lines = captured.get().splitlines()
    assert [line.split()[0] for line in lines] == ["cpu", "tpu", "h100"]
    column = head.index("goal")
    assert lines[0][column:].split()[:3] == [">=", "1.5", "yes"] and "1.62" in lines[0]
    assert lines[1][column:].split()[:3] == ["<=", "700", "no"] and "1,553" in lines[1]
    assert lines[2].split()[2] == "-"


@pytest.mark.parametrize(
    ("ours", "reach", "wanted"),
    [(1.5, ">= 1.5", True), (1.49, ">= 1.5", False), (700, "<= 700", True), (1, "<= 0", False)]
    + [(None, ">= 1", None), (3.0, "", None), (999.0, "<= 1,000", True)],
)
def test_reached(ours, reach, wanted):
    assert Row("figure", ours, "x", reach).reached is wanted


def test_only_what_is_wanted_comes_and_a_reason_stands_in_for_what_cannot():
    asked = []

    def whole(peer, wanted):
        asked.append((peer, [row.figure for row in ROWS if wanted(row.figure)]))
        yield from ROWS

    def broken(peer, wanted):
        yield ROWS[0]
        raise InputError("libtpu is missing")

    rows = list(bench_table.measure({"a": whole, "cpu": broken}, True, bench_table.matcher("^CPU")))
    assert asked == [(True, ["cpu forward"])]
    assert [row.figure for row in rows] == ["cpu forward", "cpu forward", "cpu"]
    assert rows[2].ours is None and rows[2].how == "not measured: libtpu is missing"


def test_the_record_says_when_where_and_with_what():
    record = json.loads(json.dumps(bench_table.record("kernels", ROWS)))
    assert record["suite"] == "kernels" and record["versions"]["jax"]
    assert record["machine"]["cores"] >= 1 and record["machine"]["processor"]
    assert [row["reached"] for row in record["rows"]] == [True, False, None]
    assert record["rows"][1]["peer_name"] == "8x buffer"


def test_a_process_hands_back_its_last_line_or_its_last_words(tmp_path):
    (tmp_path / "well.py").write_text("print('progress')\nprint('{\"cycles\": 12}')\n")
    (tmp_path / "ill.py").write_text("raise SystemExit('no such kernel')\n")
    path = {"PYTHONPATH": str(tmp_path)}
    assert bench_row.measure_in_process("well", environment=path) == {"cycles": 12}
    with pytest.raises(InputError, match="ill v5p ended with 1: no such kernel"):
        bench_row.measure_in_process("ill", "v5p", environment=path)


def test_a_tpu_row_counts_each_visit_at_the_cost_of_its_kind():
    sizes = bench_tpu.draws()[0]
    assert sizes.sum() == 4096 and len(sizes) == 8
    for product in ("forward", "dW"):
        heights = bench_tpu.tiles(product).heights
        kinds = len(heights) + (2 if product == "dW" else 0)
        rows = [*heights, *([heights[0]] * (kinds - len(heights))), 0]
        totals = bench_tpu.ours(product, {"visits": rows}, [sizes])
        rows_of_a_core = 4096 if product == "dW" else 2048
        assert rows_of_a_core <= totals[0] < 1.25 * rows_of_a_core


def test_bounds_of_the_matrices_gradient_for_visits_of_known_cost():
    sizes = [bench_tpu.np.array([4096 - 128, 128])]  # whole visits: nothing is rounded up
    per_row = bench_tpu.IDEAL / 4096
    costs = [100 + per_row * height for height in (384, 256, 128)]
    count = {"visits": costs, "idle": 60}
    whole, single, lean = bench_tpu.dw_at_most(count, (384, 256, 128), sizes)
    assert whole == 1 and single == pytest.approx(bench_tpu.IDEAL / (bench_tpu.IDEAL + 200))
    assert lean == pytest.approx(bench_tpu.IDEAL / (bench_tpu.IDEAL + 80))


def test_ragged_dot_visits_a_tile_of_rows_for_every_group_that_has_one_there():
    # The first tile is one group's; two groups have no row; four have one each in the second tile.
    sizes = bench_tpu.np.array([376, 0, 1, 1, 1, 1, 0, 4096 - 380])
    count = {"visit": 100, "rows": 376, "rest": 7}
    assert bench_tpu.ragged_dot(count, [sizes]) == [7 + 100 * (1 + 4 + 10)]


def test_a_peer_kernel_counts_its_visits_and_the_ends_of_its_sums():
    counted = {"steps": 4, "middle": 100.0, "ends": 140.0, "active": [10, 12]}
    assert bench_tpu_peers.totals(counted, "forward", 8) == [1100.0, 1320.0]
    assert bench_tpu_peers.totals(counted, "dW", 8) == [1320.0, 1520.0]


def test_a_peer_that_is_not_installed_stands_in_the_table(monkeypatch):
    monkeypatch.setattr(bench_tpu_peers.importlib.util, "find_spec", lambda name: None)
    row = bench_tpu._beside("tokamax", "forward", "v5p forward", 0.91, bench_tpu.IDEAL)
    assert (row.figure, row.ours, row.peer) == ("v5p forward, against tokamax", 0.91, None)
    assert row.how == "not measured: not installed"


def every(figure):
    return True


def test_without_a_gpu_its_rows_say_so():
    (row,) = bench_table.measure({"gpu": bench_gpu.rows}, True, every)
    assert row.ours is None and "not measured: needs an NVIDIA GPU" in row.how


def test_on_a_gpu_rows_of_a_cpu_are_not_timed(monkeypatch):
    monkeypatch.setattr("moejax.core.platform.jax.default_backend", lambda: "gpu")
    (row,) = bench_table.measure({"cpu": bench_gpu.rows}, False, every)
    assert row.ours is None and "JAX_PLATFORMS=cpu" in row.how


def test_rows_of_a_gpu_at_tiny_sizes(monkeypatch):
    """Timed on the CPU here: what is computed is the same, but for the peers that need a GPU."""
    monkeypatch.setattr(bench_gpu, "platform", lambda: "gpu")
    monkeypatch.setattr(bench_gpu, "SHAPES", {"tiny": (64, 4, 32, 16)})
    monkeypatch.setattr(bench_gpu, "LAYERS", {"tiny": (32, 128)})
    monkeypatch.setattr(bench_gpu, "ROUND_S", 0.001)
    rows = {row.figure: row for row in bench_gpu.rows(True, every)}
    assert list(rows)[:3] == [f"gpu tiny bf16, {op}" for op in ("forward", "dx", "dW")]
    assert all(row.ours > 0 for row in rows.values()) and len(rows) == 6
    assert rows["gpu tiny bf16, forward"].peer_name == "jax.lax.ragged_dot"
    assert "TB/s" in rows["gpu tiny layer bf16 batch 4, 50% kept, of the dense one's time"].how


def _sleeping(seconds):
    return lambda: time.sleep(seconds)


def _failing():
    raise ValueError("no such peer")


def _dying():
    os._exit(3)


def test_a_peer_runs_in_a_process_of_its_own_when_asked():
    with bench_row.Elsewhere(_sleeping, 0.05, kept=True) as peer:
        assert 0.05 <= peer.seconds() < 1
        ratio = bench_row.paired(lambda: time.sleep(0.1), peer.seconds, 3)
    assert 0.2 < ratio < 1


@pytest.mark.parametrize(
    ("make", "words"),
    [(_failing, "ValueError: no such peer"), (_dying, "its process ended with 3")],
)
def test_a_peer_that_fails_says_so(make, words):
    with pytest.raises(InputError, match=words):
        bench_row.Elsewhere(make)
