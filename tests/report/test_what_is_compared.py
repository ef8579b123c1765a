from __future__ import annotations

import json

import pytest
import yaml
from support.made_runs import make_run

from hpc_oialr.errors import DataError
from hpc_oialr.report.page import page, sentences
from hpc_oialr.report.runs import find_runs


def set_config(folder, **sections):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


@pytest.mark.parametrize(("section", "one", "other"), [("task", "A", "B"), ("model", "ViT", "GPT2")])
def test_runs_of_different_kinds_are_refused(tmp_path, section, one, other):
    for name, chosen in (("first", one), ("second", other)):
        set_config(make_run(tmp_path / name), **{section: {"class_path": chosen}})
    with pytest.raises(DataError, match=f"different {section}s: first {one}, second {other}. Make a report for each"):
        find_runs([tmp_path / "first", tmp_path / "second"])
    assert len(find_runs([tmp_path / "first", tmp_path / "first"])) == 2


def test_nothing_is_claimed_before_the_first_evaluation(tmp_path):
    dense, own = make_run(tmp_path / "dense", dense=True), make_run(tmp_path / "oialr")
    summary = json.loads((own / "summary.json").read_text())
    (own / "summary.json").write_text(json.dumps({**summary, "wall_s": 1e-6}))
    text = " ".join(sentences(find_runs([dense, own])))
    assert "which had not been evaluated after the same time" in text
    assert "and stood at" not in text


def test_secrets_of_settings_are_not_on_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    set_config(
        folder,
        data={"init_args": {"api_key": "abc-123", "path": "s3://me:pw@host/x", "password": 98765432101234}},
    )
    html = page(find_runs([folder]), tmp_path / "report.html")
    assert not any(secret in html for secret in ("abc-123", "me:pw", "98765432101234"))
    assert "s3://***@host/x" in html
