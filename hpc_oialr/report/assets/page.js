// Puts everything in its place, once.

const withLayers = RUNS.flatMap((run, i) => (run.layers ? [i] : []));
const LAYER_CHARTS = [drawLayers, drawHeatMap, drawSpectrum];
const CHARTS = {
  "chart-progress": drawProgress,
  "chart-share": drawShare,
  "chart-steps": drawStepTimes,
  "chart-pareto": drawPareto,
  "chart-layers": drawLayers,
  "chart-r": drawHeatMap,
  "chart-spectrum": drawSpectrum,
};

function on(id, event, act) {
  byId(id).addEventListener(event, act);
}

function changeRun() {
  chooseRun(Number(byId("run").value));
  spectrumView.data = null;
  chooseLayer();
  for (const chart of LAYER_CHARTS) chart();
}

function stepBy(places) {
  byId("event").value = Number(byId("event").value) + places;
  moveSpectrum();
}

function connect() {
  on("progress-value", "change", drawProgress);
  on("progress-axis", "change", drawProgress);
  on("pareto-price", "change", drawPareto);
  if (!withLayers.length) return;
  on("run", "change", changeRun);
  on("quantity", "change", drawLayers);
  on("layers-log", "change", drawLayers);
  on("filter", "input", findLayers);
  on("all", "click", () => show(found(), true));
  on("none", "click", () => show(found(), false));
  on("boxes", "change", (event) => show([Number(event.target.dataset.layer)], event.target.checked));
  on("layer", "change", () => { chooseLayer(); drawSpectrum(); });
  on("spectrum-log", "change", drawSpectrum);
  on("event", "input", moveSpectrum);
  on("before", "click", () => stepBy(-1));
  on("after", "click", () => stepBy(1));
}

function start() {
  byId("toggles").open = window.innerWidth > 900;
  applyTheme();
  listRuns();
  fill(byId("pareto-price"), Object.keys(PARETO.prices ?? {}).map((price) => [price, price]));
  if (!RUNS.some((run) => run.evaluations.step.length)) byId("progress-value").value = "losses";
  for (const chart of RUN_CHARTS) chart();
  redraws.push(listRuns, ...RUN_CHARTS);
  byId("progress-none").hidden = RUNS.some((run) => run.losses.step.length || run.evaluations.step.length);
  for (const part of ["layers", "spectrum"]) {
    byId(`${part}-none`).hidden = withLayers.length > 0;
    byId(`${part}-content`).hidden = withLayers.length === 0;
  }
  connect();
  if (withLayers.length) {
    fill(byId("run"), withLayers.map((i) => [String(i), RUNS[i].name]));
    // The first that was trained at low rank tells most.
    byId("run").value = String(withLayers.find((i) => !RUNS[i].dense) ?? withLayers[0]);
    changeRun();
    redraws.push(listLayers, ...LAYER_CHARTS);
    byId("chart-layers").on("plotly_relayout", (change) => {
      if (Object.keys(change).some((key) => key.startsWith("xaxis"))) refine();
    });
  }
  // For benchmarks and tests: when all charts stood, in ms since the page was asked for.
  document.documentElement.dataset.drawn = performance.now().toFixed(0);
}

start();
