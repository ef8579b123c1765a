// All runs in one chart: what they reached, and what it cost.

const PARETO = JSON.parse(byId("pareto").textContent);
const runShown = RUNS.map(() => true);
const SYMBOLS = ["circle", "square", "diamond", "triangle-down", "triangle-up", "cross", "x"];
const MARKS = { type: "scatter", mode: "lines+markers" };

function percent(values, name) {
  return isAccuracy(name) ? values.map((value) => (value === null ? null : 100 * value)) : values;
}

function metricTitle(name) {
  return isAccuracy(name) ? `${name} (%)` : name;
}

function titleOf(key) {
  const names = [...new Set(RUNS.filter((run) => run[key].step.length).map((run) => run[key].name))];
  return names.map(metricTitle).join(" / ");
}

function curves(key, across, form) {
  return RUNS.map((run, i) => ({
    ...MARKS,
    mode: key === "losses" ? "lines" : "lines+markers",
    name: plain(run.name),
    x: across === "share" ? run[key].share.map((share) => (share === null ? null : 100 * share)) : run[key][across],
    y: percent(run[key].value, run[key].name),
    text: run[key].step.map((step) => `step ${step}`),
    visible: runShown[i],
    line: { color: runColour(i), width: key === "losses" ? 1.2 : 2 },
    marker: { symbol: SYMBOLS[i % SYMBOLS.length], size: 7 },
    hovertemplate: `<b>%{fullData.name}</b><br>%{text}<br>${form}<extra></extra>`,
  }));
}

function drawProgress() {
  const key = byId("progress-value").value;
  const across = byId("progress-axis").value;
  const title = across === "step" ? "step" : "training time (s)";
  const form = across === "step" ? "%{y:.4~g}" : "%{x:.4~g} s<br>%{y:.4~g}";
  draw("chart-progress", curves(key, across, form), layout(axis(title), axis(titleOf(key))));
}

function drawShare() {
  const x = axis("trained parameters (% of dense)", { type: "log", autorange: "reversed", dtick: "D2", tickformat: "~g" });
  draw("chart-share", curves("evaluations", "share", "%{x:.3~g} % trained<br>%{y:.4~g}"), layout(x, axis(titleOf("evaluations"))));
}

function drawStepTimes() {
  const traces = RUNS.map((run, i) => ({
    type: "scatter", mode: "lines", name: plain(run.name), x: run.step_ms.step, y: run.step_ms.value, visible: runShown[i],
    line: { color: runColour(i), width: 1.6 },
    hovertemplate: "<b>%{fullData.name}</b><br>step %{x:.0f}<br>%{y:.4~g} ms<extra></extra>",
  }));
  draw("chart-steps", traces, layout(axis("step"), axis("time of a step (ms)", { rangemode: "tozero" })));
}

function drawCost() {
  const withRatios = RUNS.map((run, i) => [run, i]).filter(([run]) => run.ratios);
  byId("cost-note").hidden = withRatios.length > 0;
  byId("chart-cost").hidden = withRatios.length === 0;
  if (!withRatios.length) return;
  const traces = withRatios.map(([run, i]) => ({
    type: "bar", orientation: "h", name: plain(run.name), visible: runShown[i],
    y: Object.keys(run.ratios), x: Object.values(run.ratios),
    marker: { color: runColour(i) }, texttemplate: " %{x:.3~g}", textposition: "outside", cliponaxis: false,
    hovertemplate: "<b>%{fullData.name}</b><br>%{y} x %{x:.3~g}<extra></extra>",
  }));
  const one = { type: "line", xref: "x", yref: "paper", x0: 1, x1: 1, y0: 0, y1: 1, line: { color: colour("quiet"), dash: "dash", width: 1 } };
  const x = axis("relative to the dense run", { rangemode: "tozero" });
  draw("chart-cost", traces, layout(x, axis("", { autorange: "reversed" }), { shapes: [one], bargap: 0.35, margin: { l: 140, r: 40, t: 10, b: 46 } }));
}

function drawPareto() {
  const price = byId("pareto-price").value;
  if (!price) return draw("chart-pareto", [], {});
  const { metric, runs, values, prices, fronts } = PARETO;
  const y = percent(values, metric);
  const points = runs.map((name, k) => {
    const i = RUNS.findIndex((run) => run.name === name);
    return {
      ...MARKS, mode: "markers+text", name: plain(name), x: [prices[price][k]], y: [y[k]], visible: runShown[i],
      text: [plain(name)], textposition: "top center", cliponaxis: false,
      marker: { color: runColour(i), symbol: SYMBOLS[i % SYMBOLS.length], size: 11 },
      hovertemplate: `<b>%{fullData.name}</b><br>${price}: %{x:.4~g}<br>%{y:.4~g}<extra></extra>`,
    };
  });
  const line = {
    ...MARKS, mode: "lines", name: "front", x: fronts[price].map((k) => prices[price][k]), y: fronts[price].map((k) => y[k]),
    line: { color: colour("quiet"), dash: "dot", width: 1.5 }, hoverinfo: "skip",
  };
  return draw("chart-pareto", [line, ...points], layout(axis(price), axis(metricTitle(metric))));
}

const RUN_CHARTS = [drawProgress, drawShare, drawStepTimes, drawCost, drawPareto];

function listRuns() {
  const boxes = RUNS.map((run, i) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    const swatch = document.createElement("span");
    box.type = "checkbox";
    box.checked = runShown[i];
    box.addEventListener("change", () => {
      runShown[i] = box.checked;
      for (const chart of RUN_CHARTS) chart();
    });
    swatch.className = "swatch";
    swatch.style.background = runColour(i);
    label.append(box, swatch, run.name);
    return label;
  });
  byId("run-toggles").replaceChildren(byId("run-toggles").firstElementChild, ...boxes);
}
