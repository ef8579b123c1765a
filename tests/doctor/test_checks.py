"""Checks that hang or fail, findings of several processes, and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.crowd import Crowd, Say

from hpc_oialr.cli.main import entry, main
from hpc_oialr.doctor import run_checks
from hpc_oialr.doctor.checks import aggregate, worst
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem
from hpc_oialr.errors import ConfigError


def test_a_problem_has_a_fix():
    with pytest.raises(AssertionError, match="no fix for X"):
        Finding("problem", "X", "broken")


def test_findings_keep_the_order_of_checks(context):
    checks = [(name, "process", lambda _, name=name: [ok(name, "")]) for name in "cab"]
    assert [finding.name for finding in run_checks(context(), checks)] == list("cab")


def test_a_check_that_hangs_is_a_finding(context):
    never = threading.Event()
    checks = [
        ("slow", "process", lambda _: [ok("slow", str(never.wait(600)))]),
        ("quick", "process", lambda _: [ok("quick", "")]),
    ]
    slow, quick = run_checks(context(timeout_s=0.05), checks)
    never.set()
    assert (slow.name, slow.state, slow.found) == ("slow", "problem", "no answer within 0.2 s")
    assert slow.fix.startswith("oialr doctor --timeout-s 60")
    assert quick.state == "ok"


def test_a_check_that_fails_hides_no_other(context):
    def fails(_: CheckContext) -> list[Finding]:
        raise OSError("no /proc here")

    first, second = run_checks(context(), [("odd", "process", fails), ("b", "main", lambda _: [ok("b", "")])])
    assert (first.state, first.found) == ("note", "check failed: OSError: no /proc here")
    assert second.state == "ok"


@pytest.mark.parametrize(("setting", "value"), [("need_gib", 0.0), ("timeout_s", -1.0)])
def test_settings_are_checked(context, setting, value):
    with pytest.raises(ConfigError, match=rf"{setting} is {value}; must lie in \(0, inf\)"):
        context(**{setting: value})


def test_the_worst_of_all_processes_and_where():
    bad = problem("threads", "8 on 2", "export OMP_NUM_THREADS=2")
    wrong = problem("NCCL_SOCKET_IFNAME", "ib9", "export NCCL_SOCKET_IFNAME=ib0")
    everyone = [
        ("node1", [ok("job", "7"), ok("threads", "2"), note("extras", "none")]),
        ("node2", [bad, note("extras", "none")]),
        ("node3", [bad, note("extras", "none")]),
        ("node3", [bad, note("extras", "none"), wrong]),
    ]
    assert worst(everyone) == [
        ok("job", "7"),
        replace(bad, nodes=("node2", "node3")),
        note("extras", "none"),
        replace(wrong, nodes=("node3",)),
    ]


def test_processes_that_cannot_meet_show_their_own(context):
    stale = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "9",
    }
    findings, processes = aggregate(context(stale, timeout_s=1.0), [ok("job", "7")])
    assert (len(findings), processes) == (2, 1)
    finding = findings[-1]
    assert (finding.name, finding.state) == ("World", "problem")
    assert "rank 3 of 8 (torchrun) could not meet the others at localhost:9" in finding.found
    assert finding.fix == "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"


def each_its_own(rank: int, size: int, say: Say, folder: str) -> None:
    """The command in one of several processes; what it prints goes to a file."""
    os.environ.update(SLURMD_NODENAME=f"node{rank}", TORCHELASTIC_RUN_ID="x", TMPDIR=f"{folder}/{rank}")
    os.environ["PATH"] = folder
    os.environ["OMP_NUM_THREADS"] = str(1 + 99 * rank)
    file = os.open(f"{folder}/out{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    sys.stdout = os.fdopen(1, "w")
    code = main(["doctor", "--json", "--folder", folder, "--need-gib", "0.001", "--timeout-s", "60"])
    sys.stdout.flush()
    say(code)


def test_two_processes_one_table(tmp_path: Path):
    (tmp_path / "0").mkdir()
    with Crowd(each_its_own, 2, str(tmp_path)) as crowd:
        assert [crowd.end(rank) for rank in range(2)] == [(0, 1), (0, 0)]
    assert (tmp_path / "out1").read_text() == ""
    report = json.loads((tmp_path / "out0").read_text())
    assert (report["node"], report["processes"], report["problems"]) == ("node0", 2, 1)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["World"]["found"] == "2 ranks met"
    assert found["threads"]["state"] == "problem"
    assert found["threads"]["nodes"] == ["node1"]
    assert found["launcher"]["nodes"] == []


@pytest.fixture
def laptop(programs, monkeypatch):
    monkeypatch.setenv("PATH", str(programs.path))
    for name in ("SLURM_JOB_ID", "SLURM_CONF", "SBATCH_PARTITION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


WORDS = ("doctor", "--need-gib", "0.001", "--timeout-s", "60", "--folder")


def test_a_laptop_is_fit_and_torch_is_not_loaded(laptop, tmp_path):
    program = (
        "import sys; from hpc_oialr.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, *WORDS, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no Slurm here" in done.stdout
    assert done.stdout.rstrip().endswith("no problems")


def test_a_problem_is_exit_code_1_and_its_fix_a_line(laptop, programs, monkeypatch, tmp_path, capsys):
    programs.put_cluster()
    monkeypatch.setenv("SBATCH_PARTITION", "main")
    assert main([*WORDS, str(tmp_path), "--partition", "mian"]) == 1
    out = capsys.readouterr().out
    assert "there is no 'mian'" in out
    assert "problem  partition: --partition main\n" in out


def test_contradictory_variables_reach_the_command(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "argv", ["oialr", "recipes"])
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 0
    assert "fashion_mnist_vit" in capsys.readouterr().out
