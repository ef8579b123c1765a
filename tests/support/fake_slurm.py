"""Slurm's programs as one small script: they take jobs, answer from a file, and write down how they were called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAMS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")


class FakeSlurm:
    """Puts the programs first on PATH; holds what they answer.

    Parameters
    ----------
    folder
        Where programs and answers lie.
    monkeypatch
        Pytest's.
    """

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(folder))
        self.answer(jobs={}, history=None, refuse="", srun_code=0, show="JobId=12 JobState=RUNNING")

    def answer(self, **answers: Any) -> None:
        """Set answers: ``jobs`` and ``history`` by id, ``refuse`` (sbatch), ``srun_code``, ``show`` (scontrol)."""
        path = self.folder / "answers.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **answers}))

    @property
    def calls(self) -> list[list[str]]:
        """Every call so far, program and arguments."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(name: str, arguments: list[str]) -> int:
    """Act as one of the programs."""
    folder = Path(os.environ["FAKE_SLURM"])
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    answers = json.loads((folder / "answers.json").read_text())
    return int(globals()[f"_{name}"](answers, arguments) or 0)


def _sbatch(answers: dict[str, Any], arguments: list[str]) -> int:
    if answers["refuse"]:
        sys.stderr.write(f"sbatch: error: {answers['refuse']}\n")
        return 1
    if "--test-only" in arguments:
        sys.stderr.write("sbatch: Job 5 to start at 2026-01-01T10:00:00 on nodes node[1-2] in partition main\n")
    else:
        sys.stdout.write("Submitted batch job 12\n")
    return 0


def _srun(answers: dict[str, Any], arguments: list[str]) -> int:
    return int(answers["srun_code"])


def _squeue(answers: dict[str, Any], arguments: list[str]) -> None:
    (columns,) = (word.partition("=")[2].split(",") for word in arguments if word.startswith("--Format="))
    for job, fields in answers["jobs"].items():
        row = {
            "JobArrayID": job,
            "RestartCnt": 0,
            "EndTime": "N/A",
            "Reason": "None",
            **fields,
        }
        widths = (column.split(":") for column in columns)
        sys.stdout.write("".join(f"{row[column]!s:{width}}" for column, width in widths) + "\n")


def _sacct(answers: dict[str, Any], arguments: list[str]) -> int:
    if answers["history"] is None:
        sys.stderr.write("Slurm accounting storage is disabled\n")
        return 1
    for job, states in answers["history"].items():
        sys.stdout.write("".join(f"{job}|{state}|Unknown\n" for state in states))
    return 0


def _scancel(answers: dict[str, Any], arguments: list[str]) -> None:
    return


def _scontrol(answers: dict[str, Any], arguments: list[str]) -> None:
    if "show" in arguments:
        sys.stdout.write(answers["show"] + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
