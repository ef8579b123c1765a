"""``oialr plan``."""

from __future__ import annotations

import json
import re

import pytest

from hpc_oialr.cli.main import main


def test_tables_and_files(recipe, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["--nodes", "1,2,3", "--site", "horeka", "--gpus-per-node", "1"]
    assert main(["plan", str(recipe), *options, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "4 layers become low-rank" in shown
    assert "memory of a process (GiB), of 39.4" in shown
    assert "DDP, 3 nodes: 8 samples cannot be distributed over 3 ranks" in shown
    assert "stated: a100-40 (NVIDIA A100 SXM4 data sheet)" in shown
    assert "stated: hdr200 (" in shown
    content = json.loads(out.read_text())
    assert [(row["nodes"], row["fits"]) for row in content["rows"]] == [(1, True), (2, True), (3, False)]
    first, second = content["rows"][:2]
    assert "time (ms) from stated speeds" in shown
    assert first["time_from"] == "stated speeds"
    assert first["dense_sent_mb"] == 0.0 < second["dense_sent_mb"]
    assert second["dense_gradients_gib"] > 0
    assert first["peak_gib"] == max(value for key, value in first.items() if key.endswith("_peak_gib"))
    assert set(content) == {"recipe", "memory_gib", "grounds", "rows"}
    again = ["plan", str(recipe), "--site", "horeka", "--gpus-per-node", "1", "--out", str(out)]
    assert main(again) == 0, "its own file is replaced"
    out.write_text(json.dumps({"rows": []}))
    assert main(again) == 2
    assert "exists and is not a plan written by oialr" in capsys.readouterr().err


def test_too_little_memory(recipe, tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["plan", str(recipe), "--nodes", "2", "--gpu", "h100", "--memory-gib", "1e-7", "--oialr", "null"]
    assert main([*words, "--out", str(out)]) == 0
    assert re.search(r"\bno *$", capsys.readouterr().out, re.MULTILINE)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["advice"].startswith("no engine fits; try")
    assert "conversion_s" not in row


def test_probe_and_machine_at_hand(recipe, capsys):
    assert main(["plan", str(recipe), "--probe"]) == 0
    shown = capsys.readouterr().out
    assert "time (ms) from measured steps" in shown
    assert "measured: steps and conversion of one process on this machine" in shown
    assert "assumed: gloo between processes of one machine (python -m benchmarks.comm measures it)" in shown


def test_dry_run(recipe, capsys):
    assert main(["plan", str(recipe), "--dry-run", "2"]) == 0
    assert "as one of 2 processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "1,x"], "--nodes is '1,x'; must be whole numbers with commas between"),
        (["--nodes", "0"], "--nodes is [0]; must be at least 1"),
        (["--gpu", "v100"], "unknown GPU 'v100'; valid: a100-40"),
        (["--gpu", "h100", "--engines", "ddp"], "unknown engine 'ddp'; valid: DDP, DeepSpeed, FSDP, all"),
        (
            ["--gpu", "h100", "--probe"],
            "--probe is True; is of the machine at hand, and the plan is for h100",
        ),
        (
            ["--site", "horeka", "--calibration", "comm.json"],
            "--calibration is 'comm.json'; is of the machine at hand, and the plan is for horeka",
        ),
        (["--gpus-per-node", "0"], "--gpus-per-node is [0]; must be at least 1"),
        (["--r-fraction", "2"], "--r-fraction is 2.0; must lie in (0, 1]"),
        (["--dry-run", "1"], "--dry-run is 1; must be at least 2 processes"),
    ],
)
def test_what_the_user_can_put_right(recipe, capsys, words, message):
    assert main(["plan", str(recipe), *words]) == 2
    assert message in capsys.readouterr().err


def test_data_that_are_not_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    words = [
        "plan",
        "vit_b16",
        "--model.depth",
        "1",
        "--model.dim",
        "32",
        "--model.heads",
        "2",
        "--gpu",
        "a100-40",
    ]
    assert main([*words, "--oialr", "null"]) == 0
    shown = capsys.readouterr().out
    assert "assumed: the data are not here: 1,281,167 training samples" in shown
    assert main(["plan", "timeseries_autoformer", "--gpu", "a100-40"]) == 2
    assert "Run `oialr data fetch taylor-30-min`" in capsys.readouterr().err
