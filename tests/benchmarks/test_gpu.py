"""``python -m benchmarks.gpu`` in its tiny size on the CPU, and what it does when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import layer, layer_variants, predict, update
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.execution import MODES
from benchmarks.gpu.results import load
from benchmarks.gpu.sections import PLANS
from benchmarks.gpu.step import ORDER
from benchmarks.gpu.svd import METHODS

pytestmark = pytest.mark.long  # the whole command takes half a minute
ROOT = Path(__file__).resolve().parents[2]
# What GPU machines did not have; a section that imports one of these would be lost there.
ABSENT = (
    "jsonargparse",
    "submitit",
    "deepspeed",
    "matplotlib",
    "plotly",
    "pandas",
    "scipy",
    "hypothesis",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole command, in a process that lacks most packages: its file and what it printed."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    hide = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    arguments = ["--out", str(out), "--budget", "600"]
    # Time is generous, since a test must not fail on a busy machine; on an idle one it takes ten seconds.
    start = f"from benchmarks.gpu.__main__ import main; main({arguments})"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", f"{hide}; {start}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def rows_of(tiny, section):
    return load(tiny[0])["sections"][section]["rows"]


def test_every_section_has_rows_and_none_an_error(tiny):
    content = load(tiny[0])
    sections = content["sections"]
    assert list(sections) == [plan.name for plan in PLANS]
    assert {name: section["errors"] for name, section in sections.items() if section["errors"]} == {}
    assert {name: section["left out"] for name, section in sections.items() if section["left out"]} == {}
    assert all(section["rows"] for section in sections.values())
    assert (content["card"], content["tiny"]) == ("CPU", True)
    assert content["environment"]["packages"]["torch"] == torch.__version__


def test_the_table_shows_every_section_again(tiny, capsys):
    main(["--table", str(tiny[0])])
    shown = capsys.readouterr().out
    assert shown.strip() in tiny[1]
    for plan in PLANS:
        assert f"\n{plan.name} (" in shown
    assert "tiny: figures mean nothing" in shown
    assert "* eager: a CUDA graph needs a GPU" in shown


def test_every_layer_variant_is_right(tiny):
    rows = rows_of(tiny, "layer")
    assert [row["variant"] for row in rows] == list(layer_variants.VARIANTS)
    for row in rows:
        assert row["right"], row
        assert 1e-4 < row["error"] < layer.WORST_ERROR
        assert row["ms"] > 0
    by_name = {row["variant"]: row for row in rows}
    assert by_name["dense"]["time_ratio"] == 1
    # 48 x 32 at r = 8, 64 tokens: 3 B m n; 2 B r (m + n) + 3 B r^2; with B r^2 + r^2 (m + n).
    assert by_name["three products"]["operation_ratio"] == pytest.approx((81920 + 12288) / 294912)
    for name in ("factored", "folded"):
        assert by_name[name]["operation_ratio"] == pytest.approx((81920 + 4096 + 5120) / 294912)


def test_every_model_optimizer_and_mode_is_stepped(tiny):
    rows = rows_of(tiny, "step")
    assert {row["model"] for row in rows} == set(ORDER)
    assert {row["optimizer"] for row in rows} == {"AdamW", "Muon"}
    assert {row["mode"] for row in rows} == set(MODES)
    for row in rows:
        assert row["finite"] is True
        assert row["tflop"] > 0
        if not row["repeated"]:
            assert row["kernels"] > 100
            assert row["synchronisations"] == 0
    low = [row for row in rows if row["r_over_k"] is not None]
    assert low
    assert all(0 < row["operation_ratio"] < 1 for row in low)
    # Compiled code is not made again for a second dense row.
    assert sum(row["repeated"] for row in rows) == sum("compiled" not in row["mode"] for row in low)


def test_an_update_counts_waits_and_keeps_bases_orthonormal(tiny):
    rows = rows_of(tiny, "update")
    later = [("cut", 0.25), ("update", 0.25), ("cut", 0.125), ("update", 0.125)]
    for way in update.WAYS:
        events = [(row["event"], row["r_over_k"]) for row in rows if (row["model"], row["svd"]) == ("ViT-B/16", way)]
        assert events == [("conversion", 0.5), ("update", 0.5), *later]
    for row in rows:
        assert row["synchronisations"] > 0
        assert row["layers"] > 10
        assert row["seconds"] > 0
    assert max(row["orthogonality_error"] for row in rows) < 1e-5


def test_every_way_to_an_svd_is_judged(tiny):
    rows = {row["way"]: row for row in rows_of(tiny, "svd")}
    assert list(rows) == list(METHODS)
    assert all(row["residual"] < 1e-5 for row in rows.values())
    # Squaring the matrix in float32 loses digits, which the figure must show.
    assert rows["eigh of A^T A, fp32"]["orthogonality"] > 10 * rows["package"]["orthogonality"]


def test_tests_marked_gpu_are_collected_and_skipped_here(tiny):
    (row,) = rows_of(tiny, "pytest")
    assert (row["passed"], row["failed"], row["exit_code"]) == (0, 0, 0)
    assert row["skipped"] > 0


def test_accuracy_has_a_row_a_run(tiny):
    rows = rows_of(tiny, "accuracy")
    assert [row["run"] for row in rows] == ["dense Muon", "OIALR k/4"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_the_result_is_plain_json(tiny):
    text = tiny[0].read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["kind"] == "benchmarks.gpu"


def test_the_notes_are_those_of_the_committed_file():
    notes = (ROOT / "benchmarks/results/gpu_notes.md").read_text()
    assert notes == "\n".join(predict.lines()) + "\n", "run python -m benchmarks.gpu.predict"


def test_kernels_are_counted_once_and_by_what_they_do():
    times = {"nvjet_sm90_tst": 2.0, "triton_poi_fused_gelu_view_2": 1.0, "triton_poi_fused_add_view_3": 0.5}
    found = predict.sums({"kernel_ms": times})
    assert (found["products"], found["activations"], found["rest"]) == (2.0, 1.0, 0.5)
    assert sum(found.values()) == sum(times.values())
