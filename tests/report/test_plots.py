from __future__ import annotations

import re

import numpy as np
import pytest
from support.made_runs import EVIL, NAMES, make_record

from hpc_oialr import spectra
from hpc_oialr.cli.main import main
from hpc_oialr.errors import ConfigError, DataError, UnknownNameError
from hpc_oialr.report import plots
from hpc_oialr.report.plots import figure_of


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    path = tmp_path_factory.mktemp("deep") / "spectra.h5"
    make_record(path, [f"layer.{i}" for i in range(200)])
    with spectra.open(path) as record:
        yield record


def lines(axes):
    """Lines that show numbers; the mark of the conversion spans the axes."""
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def test_stability_has_a_line_a_layer_without_the_gap_at_the_conversion(run):
    axes = plots.stability(run.spectra).axes[0]
    assert [line.get_label() for line in lines(axes)] == list(NAMES)
    for index, line in enumerate(lines(axes)):
        np.testing.assert_array_equal(line.get_xdata(), [10, 20, 40, 50])
        np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.96, 0.97 + index / 1000, 0.99])
    marks = [line for line in axes.lines if line not in lines(axes)]
    assert [list(mark.get_xdata()) for mark in marks] == [[30, 30]]
    assert axes.get_ylim() == (0.0, 1.03)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(NAMES)


def test_many_layers_get_a_colour_bar_and_a_colour_each(deep):
    figure = plots.stability(deep, width="double")
    drawn, bar = figure.axes
    assert len(lines(drawn)) == 200
    assert len({line.get_color() for line in lines(drawn)}) == 200
    assert drawn.get_legend() is None
    assert bar.get_ylabel() == "depth (layer)"
    assert bar.get_ylim() == (1, 200)


def test_heat_map_shows_r_over_k(run, deep):
    axes = plots.inner_dimension(run.spectra, last_step=60).axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_array(), [[1, 1, 1, 0.75, 0.5, 0.5]] * 3)
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == list(NAMES[:2])
    axes = plots.inner_dimension(deep).axes[0]
    assert axes.get_ylabel() == "depth (layer)"
    assert axes.get_ylim() == (200.5, 0.5)


def test_waterfall_shows_spectra_cutoff_and_noise_edge(run):
    layer = run.spectra[NAMES[0]]
    axes = plots.waterfall(layer).axes[0]
    for row, line in enumerate(axes.lines[:5]):
        np.testing.assert_array_equal(line.get_ydata(), layer.spectrum(row))
    cutoff, edge = lines(axes)
    assert (cutoff.get_label(), edge.get_label()) == ("cutoff", "noise edge")
    np.testing.assert_array_equal(cutoff.get_xdata(), [6, 4])
    np.testing.assert_array_equal(cutoff.get_ydata(), [layer.spectrum(0)[5], layer.spectrum(0)[3]])
    np.testing.assert_array_equal(edge.get_ydata(), [1.5] * 5)


def test_width_must_be_known(run):
    with pytest.raises(ConfigError, match="width is 'wide'; must be one of single, double"):
        plots.stability(run.spectra, width="wide")


def test_figures_do_not_change_the_readers_own_settings(run):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.stability(run.spectra)
    assert dict(matplotlib.rcParams) == before


def test_saved_figures_hold_their_fonts_and_are_whole(run, tmp_path):
    figure = plots.stability(run.spectra)
    pdf, svg = (plots.save(figure, tmp_path / f"a.{form}").read_bytes() for form in ("pdf", "svg"))
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"<text" not in svg
    assert plots.save(figure, tmp_path / "b.svg").read_bytes() == svg
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.pdf", "a.svg", "b.svg"]
    with pytest.raises(ConfigError, match=r"must end in .png, .pdf, .svg. E.g. stability.pdf."):
        plots.save(figure, tmp_path / "a.gif")


def test_figures_by_name_say_what_they_miss(runs):
    with pytest.raises(DataError, match="dense has recorded no spectra; this figure shows them"):
        figure_of("r", runs[0], layer=None, width="single")
    with pytest.raises(UnknownNameError, match="unknown layer 'encoder'"):
        figure_of("waterfall", runs[1], layer="encoder", width="single")


def test_command_draws_and_names_the_file(comparison, tmp_path, capsys):
    out = tmp_path / "w.png"
    arguments = ["--figure", "waterfall", "--layer", EVIL, "--width", "double", "--out", str(out)]
    assert main(["spectra", "plot", str(comparison / "oialr"), *arguments]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert re.match(rb"\x89PNG", out.read_bytes())
    nowhere = tmp_path / "no" / "w.png"
    assert main(["spectra", "plot", str(comparison / "oialr"), "--out", str(nowhere)]) == 2
    assert f"oialr: error: {nowhere} cannot be written" in capsys.readouterr().err
