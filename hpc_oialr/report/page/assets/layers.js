// Lines and heat map of the chosen run's layers.

const layersView = { run: null, matrices: {}, shown: [] };
const byId = (id) => document.getElementById(id);

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

/** Steps and values of one line, without those that were not recorded. */
function line(steps, values) {
  const x = [];
  const y = [];
  for (let i = 0; i < steps.length; i++) {
    if (Number.isFinite(values[i])) {
      x.push(steps[i]);
      y.push(values[i]);
    }
  }
  return { x, y };
}

function drawLayers() {
  const { layers } = layersView.run;
  const field = byId("quantity").value;
  const rows = matrix(field);
  const label = layers.quantities[field].label;
  const colours = layerColours();
  const share = field === "r";
  const traces = layers.names.map((name, i) => ({
    type: "scatter",
    mode: "lines",
    name: plain(name),
    ...line(layers.steps, share ? rows[i].map((r) => r / layers.k[i]) : rows[i]),
    line: { color: colours[i], width: layers.names.length > 40 ? 1 : 1.6, shape: share ? "hv" : "linear" },
    visible: layersView.shown[i],
    hovertemplate: `<b>%{fullData.name}</b><br>step %{x}<br>${plain(label)} %{y:.4~g}<extra></extra>`,
  }));
  traces.push(depthBar(layers.names.length));
  const scale = byId("layers-log").checked ? "log" : "linear";
  draw("chart-layers", traces, layout(axis("step"), axis(label, { type: scale }), conversionMark(layers.conversions)));
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
      colorbar: { title: { text: "depth (layer)", side: "right" }, thickness: 10, outlinewidth: 0, nticks: 6, xpad: 6 },
    },
  };
}

function conversionMark(steps) {
  if (!steps.length) return {};
  const [from, to] = [steps[0], steps[steps.length - 1]];
  const mark = { xref: "x", yref: "paper", y0: 0, y1: 1, x0: from, x1: to, layer: "below" };
  const shape = from === to
    ? { ...mark, type: "line", line: { color: colour("quiet"), dash: "dash", width: 1 } }
    : { ...mark, type: "rect", fillcolor: colour("quiet"), opacity: 0.15, line: { width: 0 } };
  const text = { x: to, xref: "x", y: 0.02, yref: "paper", text: "conversion", showarrow: false, xanchor: "left", font: { color: colour("quiet"), size: 12 } };
  return { shapes: [shape], annotations: [text] };
}

function drawHeatMap() {
  const { layers } = layersView.run;
  const counts = forward(matrix("r"), layers);
  const edges = [0, ...layers.steps, Math.max(layers.last_step, layers.steps.at(-1) + 1)];
  const few = layers.names.length <= 40;
  const narrow = byId("chart-r").clientWidth < 560;
  const y = few && !narrow
    ? axis("", { autorange: "reversed", tickfont: { size: layers.names.length > 24 ? 10 : 12 } })
    : axis("depth (layer)", { autorange: "reversed", ...numbered(layers.names) });
  const trace = {
    type: "heatmap",
    x: edges,
    y: layers.names.map(plain),
    z: counts.map((row, i) => Array.from(row, (r) => r / layers.k[i])),
    customdata: counts.map((row) => Array.from(row)),
    zmin: 0,
    zmax: 1,
    colorscale: "Cividis",
    colorbar: { title: { text: "r / k", side: "right" }, tickformat: ".0%", thickness: 10, outlinewidth: 0, xpad: 6 },
    hovertemplate: "<b>%{y}</b><br>from step %{x}<br>r %{customdata}, %{z:.1%} of k<extra></extra>",
  };
  byId("chart-r").style.height = `${Math.min(760, Math.max(260, 90 + layers.names.length * (few ? 17 : 3.2)))}px`;
  draw("chart-r", [trace], layout(axis("step"), y));
}

/** Numbers of layers instead of their names, where names do not fit. */
function numbered(names) {
  const every = Math.max(1, Math.ceil(names.length / 10));
  const picked = names.map((name, i) => [plain(name), i + 1]).filter((_, i) => i % every === 0);
  return { tickmode: "array", tickvals: picked.map(([name]) => name), ticktext: picked.map(([, i]) => String(i)) };
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
