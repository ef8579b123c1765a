"""The page as a reader meets it: in headless Chromium, from a file, with no network."""

from __future__ import annotations

import shutil

import pytest
from support.made_runs import EVIL, NAMES, make_run

from hpc_oialr.report.page import write_report
from hpc_oialr.report.runs import find_runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
# Beside other work a page takes long.
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo <b>"
    make_run(folder / "dense", dense=True)
    make_run(folder / "oialr")
    runs = find_runs([folder])
    yield write_report(runs, folder / "report.html")
    for run in runs:
        run.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """The page, what it said and what it asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.requests, self.complaints = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.context.route("http*://**", lambda route: route.abort())
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.documentElement.dataset.drawn")

    def ask(self, expression):
        return self.page.evaluate(expression)

    def theme(self):
        return self.ask("document.documentElement.dataset.theme")


@pytest.fixture(scope="module")
def light(browser, report):
    tab = Tab(browser, report, viewport={"width": 1200, "height": 900}, color_scheme="light")
    yield tab
    tab.context.close()


@pytest.fixture(scope="module")
def dark(browser, report):
    tab = Tab(browser, report, viewport={"width": 400, "height": 800}, color_scheme="dark")
    yield tab
    tab.context.close()


def visible(tab):
    return tab.ask("document.getElementById('chart-layers').data.slice(0, 3).map((trace) => trace.visible)")


def chosen_step(tab):
    return tab.ask("document.getElementById('event-text').textContent")


def bold_line(tab):
    return tab.ask("document.getElementById('chart-spectrum').data.at(-1).y")


def test_opens_with_all_charts_and_the_record_in_them(light):
    charts = light.ask("[...document.querySelectorAll('.chart')].map((chart) => chart.data?.length ?? 0)")
    assert len(charts) == 8
    assert min(charts) >= 1
    line = light.ask("(({ x, y }) => ({ x, y }))(document.getElementById('chart-layers').data[0])")
    assert line["x"] == [10, 20, 40, 50]
    assert line["y"] == pytest.approx([0.5, 0.96, 0.97, 0.99])
    r = light.ask("document.getElementById('chart-r').data[0].z")
    assert r == [[1, 1, 1, 0.75, 0.5, 0.5]] * 3


def test_names_are_shown_and_never_run(light):
    assert light.ask("window.hacked") is None
    assert EVIL in light.page.locator("#boxes").inner_text()
    assert light.page.locator("h1").inner_text() == "demo <b>: dense and oialr"
    light.page.locator("#layer").select_option("2")
    assert light.ask("window.hacked") is None
    light.page.locator("#layer").select_option("0")


def test_hover_names_the_layer(light):
    place = light.ask(
        """(() => {
          const chart = document.getElementById("chart-layers");
          chart.scrollIntoView({ block: "center", behavior: "instant" });
          const { left, top } = chart.getBoundingClientRect();
          const { xaxis, yaxis } = chart._fullLayout;
          return [left + xaxis._offset + xaxis.d2p(40), top + yaxis._offset + yaxis.d2p(0.971)];
        })()"""
    )
    light.page.mouse.move(*place)
    light.page.mouse.move(place[0] + 1, place[1])
    label = light.page.locator("#chart-layers .hovertext").text_content()
    assert "step 40" in label
    assert any(name in label for name in NAMES)


def test_slider_chooses_the_step_of_the_spectrum(light):
    slider = light.page.locator("#event")
    # What cut most is looked at first.
    assert chosen_step(light) == "step 30: conversion, r 8 \u2192 6, 3 values above the noise edge"
    slider.focus()
    light.page.keyboard.press("ArrowRight")
    assert chosen_step(light).startswith("step 40: update, r 6 \u2192 4")
    assert [value for value in bold_line(light) if value is not None] == pytest.approx(
        [2.0, 1.75, 1.5, 1.25, 1.0, 0.75], rel=1e-4
    )
    light.page.keyboard.press("End")
    assert len([value for value in bold_line(light) if value is not None]) == 4
    assert "cut to" not in light.page.locator("#chart-spectrum").inner_text()
    light.page.locator("#before").click()
    assert "cut to 4" in light.page.locator("#chart-spectrum").inner_text()
    assert light.ask("document.getElementById('event').getAttribute('aria-valuetext')") == chosen_step(light)


def test_toggles_of_layers(light):
    assert visible(light) == [True, True, True]
    light.page.locator("#boxes input").nth(1).click()
    assert visible(light) == [True, False, True]
    light.page.locator("#none").click()
    assert visible(light) == [False, False, False]
    assert light.page.locator("#shown").inner_text() == "0 of 3"
    light.page.locator("#filter").fill("FC2")
    light.page.locator("#all").click()
    assert visible(light) == [False, True, False]
    light.page.locator("#filter").fill("")
    fc1 = light.page.get_by_role("button", name="fc1", exact=True)
    fc1.click()
    assert fc1.get_attribute("aria-pressed") == "true"
    assert visible(light) == [True, True, False]
    light.page.locator("#all").click()


def test_quantity_and_runs_are_chosen(light):
    light.page.locator("#quantity").select_option("r")
    assert light.ask("document.getElementById('chart-layers').data[0].y") == [1, 1, 0.75, 0.5, 0.5]
    light.page.locator("#quantity").select_option("stability")
    light.page.get_by_role("checkbox", name="dense").click()
    assert light.ask("document.getElementById('chart-share').data.map((trace) => trace.visible)") == [
        False,
        True,
    ]
    light.page.locator("#progress-value").select_option("losses")
    assert len(light.ask("document.getElementById('chart-progress').data[1].y")) == 5


def test_what_runs_reached_over_what_they_cost(light):
    """The dense run costs twice the time; both reach .55, so that it is beaten."""
    chart = "document.getElementById('chart-pareto')"
    points = "data.map((trace) => [trace.x[0], Math.round(trace.y[0]), trace.x.length])"
    assert light.ask(f"{chart}.{points}") == [[50, 55, 1], [100, 55, 1], [50, 55, 1]]  # the front, then the runs
    light.page.locator("#pareto-price").select_option("trained parameters")
    assert light.ask(f"{chart}.data[1].x") == [1000]
    assert light.ask(f"{chart}._fullLayout.xaxis.title.text") == "trained parameters"


def test_zooms_by_keyboard(light):
    button = light.page.locator('[data-chart="chart-r"]').get_by_role("button", name="Zoom in")
    width = "(([from, to]) => to - from)(document.getElementById('chart-r')._fullLayout.xaxis.range)"
    before = light.ask(width)
    button.focus()
    light.page.keyboard.press("Enter")
    assert light.ask(width) == pytest.approx(0.6 * before)
    light.page.locator('[data-chart="chart-r"]').get_by_role("button", name="Reset").click()
    assert light.ask(width) == pytest.approx(before)


def test_reset_keeps_the_directions_of_axes(light):
    ranges = """["chart-r", "chart-share"].map((id) => {
      const { xaxis, yaxis } = document.getElementById(id)._fullLayout;
      return [xaxis.range, yaxis.range];
    })"""
    for name in ("chart-r", "chart-share"):
        light.page.locator(f'[data-chart="{name}"]').get_by_role("button", name="Reset").click()
    before = light.ask(ranges)
    for name in ("chart-r", "chart-share"):
        light.page.locator(f'[data-chart="{name}"]').get_by_role("button", name="Zoom out").click()
    assert light.ask(ranges) != before
    for name in ("chart-r", "chart-share"):
        light.page.locator(f'[data-chart="{name}"]').get_by_role("button", name="Reset").click()
    assert light.ask(ranges) == before
    assert light.ask("document.getElementById('chart-r')._fullLayout.yaxis.range") == [3.5, 0.5]


def test_thinned_lines_keep_their_spikes_and_a_zoom_shows_all(light):
    steps = "Array.from({ length: 1000 }, (_, i) => 10 * i)"
    spiky = "Array.from({ length: 1000 }, (_, i) => (i === 501 ? -1 : i === 502 ? 7 : 1))"
    thin = light.ask(f"line({steps}, {spiky}, [0, 1000], 20)")
    assert len(thin["x"]) <= 20
    assert (min(thin["y"]), max(thin["y"])) == (-1, 7)
    assert thin["x"][thin["y"].index(7)] == 5020
    zoomed = light.ask(f"line({steps}, {spiky}, placesBetween({steps}, [5000, 5040]), 20)")
    assert zoomed["x"] == [4990, 5000, 5010, 5020, 5030, 5040, 5050]


def test_first_key_leads_past_the_head(dark):
    dark.page.keyboard.press("Tab")
    assert dark.ask("document.activeElement.textContent") == "Skip to the report"
    assert dark.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    dark.page.keyboard.press("Enter")
    assert dark.ask("document.activeElement.id") == "main"


def test_every_control_has_a_name(light):
    nameless = light.ask(
        """[...document.querySelectorAll("button, select, input")].filter((each) =>
          !each.labels?.length && !each.getAttribute("aria-label") && !each.textContent.trim()).length"""
    )
    assert nameless == 0


def test_dark_by_the_system_and_by_the_button(dark, light):
    assert (dark.theme(), light.theme()) == ("dark", "light")
    font = "document.getElementById('chart-layers')._fullLayout.font.color"
    assert dark.ask(font) != light.ask(font)
    button = dark.page.locator("#theme")
    button.click()
    assert (button.inner_text(), dark.theme()) == ("Theme: light", "light")
    assert dark.ask(font) == light.ask(font)
    button.click()
    assert (button.inner_text(), dark.theme()) == ("Theme: dark", "dark")


def test_a_narrow_screen_is_enough(dark):
    assert dark.ask("document.documentElement.scrollWidth") == 400


def test_what_was_not_recorded_is_left_out(browser, tmp_path):
    runs = find_runs([make_run(tmp_path / "dense", dense=True)])
    tab = Tab(browser, write_report(runs, tmp_path / "report.html"))
    shown = tab.ask(
        "[...document.querySelectorAll('.chart')].filter((each) => each.checkVisibility()).map((each) => each.id)"
    )
    assert shown == ["chart-progress", "chart-share", "chart-steps"]
    assert tab.page.locator("#layers-none").inner_text() == "No run has recorded events of layers."
    assert tab.complaints == []
    tab.context.close()


def test_nothing_leaves_the_page_and_nothing_is_complained_of(light, dark, report):
    # The last test of the file: everything above has been done to these two pages.
    assert light.requests == dark.requests == [report.as_uri()]
    assert light.complaints == dark.complaints == []
    refused = light.ask("fetch('https://example.org').then(() => 'sent', (error) => error.name)")
    assert refused == "TypeError"
    assert any("Content Security Policy" in text for text in light.complaints)
