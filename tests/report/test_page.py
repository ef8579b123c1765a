from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from support.made_runs import EVIL, NAMES, make_record, make_run

from hpc_oialr.cli.main import main
from hpc_oialr.report import page_data as page_data_module
from hpc_oialr.report.page import (
    difference_table,
    environment_table,
    file_list,
    metric_text,
    page,
    sentences,
    side_by_side,
)
from hpc_oialr.report.page_data import floats, page_data
from hpc_oialr.report.runs import find_runs


def unpacked(text):
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def test_floats_keep_their_gaps():
    values = np.array([1.5, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(unpacked(floats(values)), values)


def test_page_data_are_the_records(run):
    layers = page_data(run)["layers"]
    assert layers["names"] == list(NAMES)
    assert layers["steps"] == [10, 20, 30, 40, 50]
    assert layers["conversions"] == [30]
    assert set(layers["quantities"]) == {"stability", "r", "stable_rank", "values_above_edge"}
    matrix = unpacked(layers["quantities"]["stability"]["values"]).reshape(3, 5)
    np.testing.assert_array_equal(matrix[2], np.array([0.5, 0.96, np.nan, 0.972, 0.99], dtype="f4"))


def test_page_spectra_are_the_records(run):
    spectrum = page_data(run)["spectra"][0]
    assert spectrum["index"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert spectrum["kind"][2:] == ["conversion", "update", "update"]
    values = run.spectra[NAMES[0]].singular_values
    np.testing.assert_array_equal(unpacked(spectrum["values"]).reshape(5, 8), values)


def test_values_too_small_for_a_logarithmic_axis_are_drawn_at_its_end(run, monkeypatch):
    monkeypatch.setattr(page_data_module, "DEPTH", 0.5)
    drawn = unpacked(page_data(run)["spectra"][0]["values"]).reshape(5, 8)
    np.testing.assert_array_equal(drawn, np.maximum(run.spectra[NAMES[0]].singular_values, 1.0))


def test_long_runs_are_thinned_to_the_last_value_of_each_column(run, monkeypatch):
    monkeypatch.setattr(page_data_module, "COLUMNS", 2)
    monkeypatch.setattr(page_data_module, "SPECTRA", 3)
    content = page_data(run)
    assert content["layers"]["steps"] == [30, 50]
    assert content["layers"]["recorded_steps"] == 5
    matrix = unpacked(content["layers"]["quantities"]["stability"]["values"]).reshape(3, 2)
    np.testing.assert_array_equal(matrix[0], np.array([0.96, 0.99], dtype="f4"))
    assert content["spectra"][0]["step"] == [10, 30, 50]


def test_sentences_say_what_is_there(runs):
    assert list(sentences(runs)) == [
        "dense: test accuracy 55.00 % after 50 steps and 100 s of training; 100.0% of the parameters are trained at "
        "the end.",
        "oialr: test accuracy 55.00 % after 50 steps and 50 s of training; 25.0% of the parameters are trained at the "
        "end.",
        "Against dense, oialr took 0.50 of the time and 0.80 of the peak memory, and ended at 55.00 % where dense "
        "ended at 55.00 % and stood at 52.50 % after the same time.",
        "In oialr, the stability of 3 of 3 layers stays above 0.95, of half of these from step 20 on, of all "
        "from step 20.",
        f"oialr was converted at step 30; r is 50.0% of k at the end in the mean of its layers, and 50.0% in {NAMES[0]}, "
        "where it is least.",
    ]


def test_sentences_of_layers_that_do_not_settle(run, monkeypatch):
    monkeypatch.setattr("hpc_oialr.report.page.STABLE", 0.9715)
    told = " ".join(sentences([run]))
    assert "3 of 3 layers stays above 0.9715, of half of these from step 50 on, of all from step 50." in told
    monkeypatch.setattr("hpc_oialr.report.page.STABLE", 0.995)
    assert "the stability of 0 of 3 layers stays above 0.995." in " ".join(sentences([run]))


def test_a_run_that_goes_on_is_told_as_such(tmp_path):
    runs = find_runs([make_run(tmp_path / "going", ended=False)])
    assert next(iter(sentences(runs))) == "going has not ended: 50 steps so far."
    assert "has not ended" in page(runs, tmp_path / "report.html")
    runs[0].close()


def test_a_record_alone_is_told_as_such(tmp_path):
    make_record(tmp_path / "spectra.h5")
    runs = find_runs([tmp_path / "spectra.h5"])
    assert next(iter(sentences(runs))) == f"{tmp_path.name} is a record of spectra alone, up to step 50."
    assert "not known" in page(runs, tmp_path / "report.html")
    runs[0].close()


def test_tables_show_differences_and_escape(runs):
    table = difference_table(runs)
    assert '<th scope="row">oialr.delay</th>' in table
    assert "train.steps" not in table
    assert "n&lt;1&gt;" in environment_table(runs)
    assert difference_table(runs[:1]) == "<p>There is one run only; nothing to compare its settings with.</p>"
    assert difference_table([runs[0], runs[0]]) == "<p>All settings are equal.</p>"


def test_numbers_and_settings_as_text():
    assert metric_text(0.8929, "test_accuracy") == "89.29 %"
    assert metric_text(1.25, "test_loss") == "1.2500"
    settings = {"train": {"steps": 5, "clip": None}, "compile": False}
    assert side_by_side([settings]) == [
        ("train.steps", ("5",)),
        ("train.clip", ("—",)),
        ("compile", ("False",)),
    ]


def test_links_are_relative_to_the_page(runs, comparison, tmp_path):
    assert 'href="dense/config.yaml"' in file_list(runs[0], comparison / "report.html")
    assert 'href="../demo/oialr/spectra.h5"' in file_list(runs[1], tmp_path / "pages" / "report.html")


def test_page_lets_no_text_run_and_no_request_out(runs, comparison):
    html = page(runs, comparison / "report.html")
    assert EVIL not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    for script in re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    blocks = re.findall(r'<script type="application/json" class="run">(.*?)</script>', html, flags=re.DOTALL)
    assert [json.loads(block)["name"] for block in blocks] == ["dense", "oialr"]
    assert json.loads(blocks[1])["layers"]["names"][2] == EVIL


def test_command_writes_one_page_in_the_folder_of_all(comparison, capsys):
    assert main(["report", str(comparison / "dense"), str(comparison / "oialr")]) == 0
    assert capsys.readouterr().out == f"{comparison / 'report.html'}\n"
    assert sorted(path.name for path in comparison.iterdir()) == ["dense", "oialr", "report.html"]


def test_command_names_what_is_wrong(comparison, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(comparison), "--out", str(tmp_path / "no" / "a.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_plotly_the_install_line_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"The report page needs plotly. Install it with: pip install 'hpc_oialr"):
        page(runs, tmp_path / "report.html")
