"""The search with runs that are only written down: what is asked, stopped early, failed, refused and taken up again."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState
from support.tiny_runs import write_recipe

from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.launch.request import Request
from hpc_oialr.record.owner import Claim
from hpc_oialr.search.results import findings
from hpc_oialr.search.runs import TrialRuns
from hpc_oialr.search.search import Search
from hpc_oialr.search.space import check_space, read_space
from hpc_oialr.search.study import JOURNAL, StudySettings

EVALUATIONS = 6
SPACE = """
space:
  optimizer.lr: {kind: float, range: [1e-3, 1.0], log: true}
  oialr.delay: {kind: int, range: [1, 20]}
"""


@dataclass
class WrittenRuns(TrialRuns):
    """Runs whose loss has its minimum at lr = 0.1; each look at them lets one more evaluation happen."""

    refuse_beyond: int = 10**6  # Slurm takes so many jobs at once
    broken: tuple[int, ...] = ()  # trials whose run fails
    unfit: tuple[int, ...] = ()  # trials whose settings do not fit each other
    dying: set[int] = field(default_factory=set)  # jobs that an earlier call has told to end: over at the next look
    split: str = "validation"
    jobs: dict[int, list[Any]] = field(default_factory=dict)  # evaluations done and lr, of running ones
    started: list[int] = field(default_factory=list)
    most: int = 0

    def submission(self, number, values, slot=0):
        if number in self.unfit:
            raise ConfigError("oialr.delay", 3, "does not fit")
        return number, values.get("optimizer.lr", 0.02)

    def start(self, submission):
        if len(self.jobs) >= self.refuse_beyond:
            raise OIALRError("Slurm refused the job: QOSMaxSubmitJobPerUserLimit")
        number, lr = submission
        self.started.append(number)
        self.run(number).create()
        self.jobs[number] = [0, lr]
        self.most = max(self.most, len(self.jobs))

    def alive(self, number):
        return number in self.jobs or number in self.dying

    def over(self, numbers):
        done = {}
        for number in numbers:
            if number in self.jobs:
                self._step(number)
            self.dying.discard(number)
            done[number] = number not in self.jobs
        return done

    def _step(self, number):
        evaluations, lr = self.jobs[number]
        self.jobs[number][0] += 1
        if number in self.broken:
            del self.jobs[number]
            return
        loss = abs(math.log10(lr) + 1) + 1 / (evaluations + 1)
        row = {"step": evaluations, "split": self.split, "metric": loss}
        with self.run(number).metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if evaluations + 1 == EVALUATIONS:
            del self.jobs[number]
            # What it measures on test data is another number.
            summary = {"metric": 100 + loss, "metric_name": "test_bits", "wall_s": 10 * lr, "trainable_params": 7}
            self.run(number).write_summary(summary)

    def error(self, number):
        return "oialr: error: nothing works"

    def end(self, number):
        self.jobs.pop(number, None)


@pytest.fixture
def made(tmp_path):
    """Makes a search of the tiny recipe; its runs are those of the last one made, or new ones."""
    (tmp_path / "space.yaml").write_text(SPACE)
    recipe, space = write_recipe(tmp_path), read_space(tmp_path / "space.yaml")

    def make(trials=12, parallel=3, objectives=("metric",), prune=True, settings=(), **over):
        request = Request(executor="local")
        runs = WrittenRuns(str(recipe), list(settings), request, tmp_path / "search", parallel, **over)
        chosen = StudySettings(objectives, False, EVALUATIONS, parallel, 0, prune)
        said = []
        search = Search(check_space(recipe, space, settings), space, chosen, runs, trials, said.append, poll_s=0.0)
        return search, runs, said

    return make


def go(search, looks=10**6):
    """Run a search, for so many looks at its runs; its study."""
    left = iter(range(looks))
    return search.run(stopped=lambda: "" if next(left, None) is not None else "TERM", claim=Claim())


def states(study):
    return [trial.state.name for trial in study.get_trials()]


def test_poor_trials_are_stopped_early_and_the_best_is_a_recipe(made, tmp_path):
    search, runs, said = made()
    study = go(search)
    found = states(study)
    assert len(found) == 12
    assert found[0] == "COMPLETE"
    assert set(found) == {"COMPLETE", "PRUNED"}
    assert runs.most == 3
    assert said[0] == "trial 0: the recipe itself"
    assert not runs.jobs
    result = findings(study, runs, ["metric"], "bits per byte")
    best, own = result.best, result.own
    losses = {trial.number: trial.value for trial in study.get_trials(states=[TrialState.COMPLETE])}
    assert best.number == min(losses, key=losses.get) != 0
    assert own.values == (abs(math.log10(0.02) + 1) + 1 / EVALUATIONS,)
    assert (
        f"trial {best.number} beats the recipe itself: validation bits per byte {best.values[0]:.5g}"
        in result.verdict()
    )
    assert f"on test data, by which nothing was chosen, {100 + best.values[0]:.5g} against" in result.verdict()
    table, recipe = result.write()
    tree = yaml.safe_load(recipe.read_text())
    assert tree["optimizer"]["init_args"]["lr"] == best.settings["optimizer.lr"]
    assert tree["oialr"]["delay"] == best.settings["oialr.delay"]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["state"] for row in rows] == [state.lower() for state in found]
    assert rows[0]["oialr.delay"] == "6"
    assert f"--optimizer.lr {best.settings['optimizer.lr']}" in result.command(best)


def test_nothing_beats_the_recipe(made):
    search, runs, _ = made(trials=1)
    result = findings(go(search), runs, ["metric"], "bits_per_byte")
    assert result.verdict().startswith("no trial beats the recipe itself, validation bits per byte 0.86")


def test_pareto_front_of_several_objectives(made, tmp_path):
    search, runs, _ = made(objectives=("metric", "wall_s"), trials=10)
    study = go(search)
    assert set(states(study)) == {"COMPLETE"}, "Optuna stops trials early by one objective only"
    result = findings(study, runs, ["metric", "wall_s"], "bits_per_byte")
    points = {row.number: row.values for row in result.rows}
    front = {
        n for n, (a, b) in points.items() if not any(x <= a and y <= b and (x, y) != (a, b) for x, y in points.values())
    }
    assert {row.number for row in result.rows if row.best} == front
    assert len(front) > 1
    assert result.best.values[0] == min(loss for loss, _ in points.values())
    result.plot(tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_continued(made, tmp_path):
    """Finished trials are not run again, running ones go on, lost ones are started again; a torn journal is read."""
    search, first, _ = made()
    study = go(search, looks=8)
    assert study is None
    journal = tmp_path / "search" / JOURNAL
    running = sorted(first.started[-3:])
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 5, "wor')
    journal.with_name(f"{JOURNAL}.lock").symlink_to(journal)
    again, second, said = made()
    second.jobs = {running[0]: [first.run(running[0]).metrics.read_text().count("\n"), 0.5]}
    study = go(again)
    assert len(states(study)) == 12
    assert set(states(study)) == {"COMPLETE", "PRUNED"}
    assert f"trial {running[0]}: taken up again" in said
    assert set(running[1:]) <= set(second.started)
    assert not {0, running[0]} & set(second.started)
    lr = [trial.params["optimizer.lr"] for trial in study.get_trials()]
    assert len(set(lr)) == 12, "the sampler does not begin with the same numbers again"
    assert go(made()[0]) is not None
    assert not made()[1].started


def test_stopped_and_continued_at_once(made):
    """Runs that are still ending as the search continues are no failures."""
    search, first, said = made()
    assert go(search, looks=3) is None
    assert said[-1] == "stopped by TERM; running trials stop with a checkpoint"
    assert not first.jobs
    again, second, said = made(dying={0, 1})
    study = go(again)
    assert set(states(study)) == {"COMPLETE", "PRUNED"}
    assert second.started[:3] == [2, 0, 1]
    assert said.count("trial 0: taken up again") == said.count("trial 0: runs anew") == 1


def test_another_search_in_the_folder(made):
    go(made(trials=1)[0])
    with pytest.raises(OIALRError, match="holds a search with another config"):
        go(made(trials=1, settings=["--train.seed", "3"])[0])
    with pytest.raises(OIALRError, match="holds a search with another objectives"):
        go(made(trials=1, objectives=("wall_s",))[0])


def test_failures(made):
    search, runs, said = made(trials=6, broken=(2,), unfit=(3,), refuse_beyond=2)
    study = go(search)
    assert states(study)[2:4] == ["FAIL", "FAIL"]
    assert len(states(study)) == 6
    assert runs.most == 2, "what Slurm refuses waits"
    assert any("waits: Slurm refused the job: QOSMax" in line for line in said)
    result = findings(study, runs, ["metric"], "bits_per_byte")
    assert [row.error for row in result.rows][2:4] == ["oialr: error: nothing works", "oialr.delay is 3; does not fit."]


def test_the_recipe_itself_fails(made):
    with pytest.raises(OIALRError, match=r"the recipe itself fails .*trial_0000\): oialr: error: nothing works"):
        go(made(broken=(0,))[0])
    study = go(made(trials=5)[0])
    own = [trial for trial in study.get_trials() if "recipe" in trial.user_attrs]
    assert [trial.state.name for trial in own] == ["FAIL", "COMPLETE"]


def test_local_runs_have_gpus_of_their_own(tmp_path):
    request = Request(executor="local", gpus_per_node=2)
    runs = TrialRuns(str(write_recipe(tmp_path)), [], request, tmp_path / "search", 2)
    submission = runs.submission(3, {"optimizer.lr": 0.5}, slot=1)
    assert tuple(submission.request.visible_gpus) == (2, 3)
    assert submission.folder == tmp_path / "search" / "trial_0003"
    assert submission.runs[0].settings == ("--optimizer.lr", "0.5")


def test_trials_are_not_chosen_by_test_data(made):
    search, runs, _ = made(split="test")
    with pytest.raises(OIALRError, match="has no validation data, and trials are not to be chosen by test data"):
        go(search)
    assert not runs.jobs, "nobody would watch them"
