// Lines and heat map of the chosen run's layers.

// As many points are drawn at once; a zoom draws what it shows anew.
const POINTS = 24000;
const EVERYTHING = [-Infinity, Infinity];
const layersView = { run: null, matrices: {}, shown: [] };

function chooseRun(number) {
  const run = RUNS[number];
  layersView.run = run;
  layersView.matrices = {};
  layersView.shown = run.layers.names.map(() => true);
  fill(byId("quantity"), Object.entries(run.layers.quantities).map(([field, { label }]) => [field, label]));
  fill(byId("layer"), run.layers.names.map((name, i) => [String(i), `${name} (${run.layers.shapes[i]})`]));
  listLayers();
  const { steps, recorded_steps: recorded } = run.layers;
  byId("layers-thinned").textContent =
    recorded > steps.length ? `Of ${recorded} steps with events ${steps.length} are shown; spectra.h5 holds all.` : "";
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

function matrix(field) {
  const { layers } = layersView.run;
  layersView.matrices[field] ??= rowsOf(layers.quantities[field].values, layers.steps.length);
  return layersView.matrices[field];
}

function layerColours() {
  const last = Math.max(1, layersView.run.layers.names.length - 1);
  return layersView.run.layers.names.map((_, i) => shade(i / last));
}

/** Places between two steps, and one beyond on each side, so that lines reach the chart's edge. */
function placesBetween(steps, [from, to]) {
  const first = steps.findIndex((step) => step >= from);
  const last = steps.findLastIndex((step) => step <= to);
  return [Math.max(0, (first < 0 ? steps.length : first) - 1), Math.min(steps.length, last + 2)];
}

/** Steps and values of one line, without those that were not recorded; of many only each part's least and largest. */
function line(steps, values, [begin, end], most) {
  const known = [];
  for (let i = begin; i < end; i++) if (Number.isFinite(values[i])) known.push(i);
  const kept = known.length > most ? extremes(known, values, most >> 1) : known;
  return { x: kept.map((i) => steps[i]), y: kept.map((i) => values[i]) };
}

function extremes(known, values, parts) {
  const kept = [];
  for (let part = 0; part < parts; part++) {
    const places = known.slice((part * known.length) / parts, ((part + 1) * known.length) / parts);
    let [low, high] = [places[0], places[0]];
    for (const i of places) {
      if (values[i] < values[low]) low = i;
      if (values[i] > values[high]) high = i;
    }
    if (low === high) kept.push(low);
    else kept.push(Math.min(low, high), Math.max(low, high));
  }
  return kept;
}

/** Points a line may have: all that a zoom shows, fewer where there are many lines. */
function pointsALine() {
  return Math.max(120, Math.floor(POINTS / layersView.run.layers.names.length));
}

function drawLayers() {
  const { layers } = layersView.run;
  const field = byId("quantity").value;
  const label = layers.quantities[field].label;
  const colours = layerColours();
  const shape = field === "r" ? "hv" : "linear";
  const points = linesWithin(EVERYTHING);
  const traces = layers.names.map((name, i) => ({
    type: "scatter",
    mode: "lines",
    name: plain(name),
    ...points[i],
    line: { color: colours[i], width: layers.names.length > 40 ? 1 : 1.6, shape },
    visible: layersView.shown[i],
    hovertemplate: `<b>%{fullData.name}</b><br>step %{x}<br>${plain(label)} %{y:.4~g}<extra></extra>`,
  }));
  traces.push(depthBar(layers.names.length));
  const scale = byId("layers-log").checked ? "log" : "linear";
  const x = axis("step", { range: ends(layers) });
  draw("chart-layers", traces, layout(x, axis(label, { type: scale }), conversionMark(layers.conversions)));
}

/** From 0 to the run's end, so that this chart and the heat map lie side by side. */
function ends(layers) {
  return [0, Math.max(layers.last_step, layers.steps.at(-1) + 1)];
}

/** Points of every layer's line of the chosen quantity. */
function linesWithin(range) {
  const { layers } = layersView.run;
  const field = byId("quantity").value;
  const within = placesBetween(layers.steps, range);
  return matrix(field).map((row, i) => {
    const values = field === "r" ? row.map((r) => r / layers.k[i]) : row;
    return line(layers.steps, values, within, pointsALine());
  });
}

/** Draw the lines of a zoom with all their points. */
function refine() {
  const { layers } = layersView.run;
  if (layers.steps.length <= pointsALine()) return;
  const points = linesWithin(byId("chart-layers")._fullLayout.xaxis.range);
  const data = { x: points.map(({ x }) => x), y: points.map(({ y }) => y) };
  Plotly.restyle("chart-layers", data, points.map((_, i) => i));
}

function depthBar(count) {
  return {
    type: "scatter",
    x: [null],
    y: [null],
    mode: "markers",
    hoverinfo: "skip",
    marker: {
      color: [1], cmin: 1, cmax: Math.max(2, count), colorscale: shades(), showscale: true,
      colorbar: { title: { text: "depth", side: "top" }, thickness: 10, outlinewidth: 0, nticks: 6, xpad: 6 },
    },
  };
}

function conversionMark(steps) {
  if (!steps.length) return {};
  const [from, to] = [steps[0], steps[steps.length - 1]];
  const mark = { xref: "x", yref: "paper", y0: 0, y1: 1, x0: from, x1: to, layer: "between" };
  const shape = from === to
    ? { ...mark, type: "line", line: { color: colour("quiet"), dash: "dash", width: 1 } }
    : { ...mark, type: "rect", fillcolor: colour("quiet"), opacity: 0.15, line: { width: 0 } };
  const text = { x: to, xref: "x", y: 0.02, yref: "paper", text: "conversion", showarrow: false, xanchor: "left", font: { color: colour("quiet"), size: 12 } };
  return { shapes: [shape], annotations: [text] };
}

function drawHeatMap() {
  const { layers } = layersView.run;
  const counts = forward(matrix("r"), layers);
  const columns = evenly(layers.steps.length + 1, 256);
  const edges = [...columns.map((i) => (i ? layers.steps[i - 1] : 0)), ends(layers)[1]];
  const few = layers.names.length <= 40;
  const narrow = byId("chart-r").clientWidth < 560;
  const y = few && !narrow
    ? axis("", { autorange: "reversed", automargin: true, ...named(layers.names) })
    : axis("depth (layer)", { autorange: "reversed" });
  const trace = {
    type: "heatmap",
    x: edges,
    y: layers.names.map((_, i) => i + 1),
    z: counts.map((row, i) => columns.map((column) => row[column] / layers.k[i])),
    text: layers.names.map((name, i) => new Array(columns.length).fill(`${plain(name)}</b><br>k ${layers.k[i]}`)),
    zmin: 0,
    zmax: 1,
    colorscale: "Cividis",
    colorbar: { title: { text: "r / k", side: "top" }, tickformat: ".0%", thickness: 10, outlinewidth: 0, xpad: 6 },
    hovertemplate: "<b>%{text}<br>r / k %{z:.1%}<br>near step %{x:.0f}<extra></extra>",
  };
  byId("chart-r").style.height = `${Math.min(760, Math.max(260, 90 + layers.names.length * (few ? 15 : 3)))}px`;
  draw("chart-r", [trace], layout(axis("step"), y));
}

function named(names) {
  const tickfont = { size: names.length > 24 ? 10 : 12 };
  return { tickmode: "array", tickvals: names.map((_, i) => i + 1), ticktext: names.map(plain), tickfont };
}

/** At most so many of the places below count, equally far apart, with the first. */
function evenly(count, most) {
  const kept = Math.min(count, most);
  return Array.from({ length: kept }, (_, i) => Math.floor((i * count) / kept));
}

/** r in force between events: k before the first one. */
function forward(rows, layers) {
  return rows.map((row, i) => {
    const held = new Float32Array(row.length + 1);
    held[0] = layers.k[i];
    for (let column = 0; column < row.length; column++) {
      held[column + 1] = Number.isFinite(row[column]) ? row[column] : held[column];
    }
    return held;
  });
}

function listLayers() {
  const colours = layerColours();
  byId("boxes").replaceChildren(
    ...layersView.run.layers.names.map((name, i) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      const swatch = document.createElement("span");
      box.type = "checkbox";
      box.checked = layersView.shown[i];
      box.dataset.layer = i;
      swatch.className = "swatch";
      swatch.style.background = colours[i];
      label.append(box, swatch, name);
      return label;
    }),
  );
  listKinds();
  findLayers();
}

/** The last part of a name: q_proj, fc1. */
function kindOf(name) {
  return name.split(".").at(-1);
}

function listKinds() {
  const kinds = [...new Set(layersView.run.layers.names.map(kindOf))];
  byId("kinds").hidden = kinds.length < 2 || kinds.length > 12;
  byId("kinds").replaceChildren(
    ...kinds.map((kind) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        show(indices((name) => kindOf(name) === kind), on);
      });
      return button;
    }),
  );
}

function indices(chosen) {
  return layersView.run.layers.names.flatMap((name, i) => (chosen(name, i) ? [i] : []));
}

function show(which, on) {
  for (const i of which) layersView.shown[i] = on;
  Plotly.restyle("chart-layers", { visible: on }, which);
  tellShown();
}

function tellShown() {
  const { names } = layersView.run.layers;
  for (const box of byId("boxes").querySelectorAll("input")) box.checked = layersView.shown[box.dataset.layer];
  for (const button of byId("kinds").children) {
    const own = indices((name) => kindOf(name) === button.textContent);
    button.setAttribute("aria-pressed", String(own.every((i) => layersView.shown[i])));
  }
  byId("shown").textContent = `${layersView.shown.filter(Boolean).length} of ${names.length}`;
}

function found() {
  return [...byId("boxes").querySelectorAll("label:not([hidden]) input")].map((box) => Number(box.dataset.layer));
}

function findLayers() {
  const part = byId("filter").value.toLowerCase();
  for (const label of byId("boxes").children) label.hidden = !label.textContent.toLowerCase().includes(part);
  tellShown();
}
