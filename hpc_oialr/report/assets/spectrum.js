// Singular values of one layer at a step that the slider chooses.

const spectrumView = { rows: [], data: null };
const FAINT = 24;

function chooseLayer() {
  const step = spectrumView.data?.step[byId("event").value];
  const data = layersView.run.spectra[byId("layer").value];
  spectrumView.data = data;
  spectrumView.rows = rowsWithGaps(data.values, data.index.length);
  byId("event").max = data.step.length - 1;
  // Another layer is shown at the step that was looked at.
  byId("event").value = step === undefined ? mostCut(data) : nearest(data.step, step);
}

/** The event that cut most, the last one where none did: what is looked at first. */
function mostCut(data) {
  const cuts = data.r.map((r, i) => data.r_before[i] - r);
  const most = Math.max(...cuts);
  return most > 0 ? cuts.indexOf(most) : cuts.length - 1;
}

function nearest(steps, step) {
  return steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);
}

function drawSpectrum() {
  const { data, rows } = spectrumView;
  const last = Math.max(1, data.step.length - 1);
  const every = Math.max(1, Math.ceil(data.step.length / FAINT));
  const faint = rows.flatMap((values, i) => (i % every && i !== last ? [] : [[values, i]]));
  const traces = faint.map(([values, i]) => ({
    type: "scatter", mode: "lines", x: data.index, y: values, hoverinfo: "skip", opacity: 0.45,
    line: { color: shade(i / last), width: 1 },
  }));
  traces.push(chosen());
  const logarithmic = byId("spectrum-log").checked;
  const x = logarithmic ? logAxis("index i", data.index, { dtick: "D2", tickformat: "~g" }) : axis("index i");
  const shape = layout(x, logAxis("singular value", rows.flat()), marks());
  draw("chart-spectrum", traces, shape);
  tellEvent();
}

function chosen() {
  const { data, rows } = spectrumView;
  const at = Number(byId("event").value);
  return {
    type: "scatter", mode: "lines+markers", x: data.index, y: rows[at],
    line: { color: colour("accent"), width: 3 }, marker: { size: 4 },
    hovertemplate: `step ${data.step[at]}<br>s<sub>%{x}</sub> = %{y:.4~g}<extra></extra>`,
  };
}

/** Moves the bold line and the marks only: quick enough to follow a finger. */
function moveSpectrum() {
  const { x, y, hovertemplate } = chosen();
  const bold = byId("chart-spectrum").data.length - 1;
  Plotly.update("chart-spectrum", { x: [x], y: [y], hovertemplate }, marks(), [bold]);
  tellEvent();
}

function marks() {
  const { data } = spectrumView;
  const at = Number(byId("event").value);
  const logarithmic = byId("spectrum-log").checked;
  const shapes = [];
  const annotations = [];
  const text = { showarrow: false, font: { size: 12 } };
  if (data.r[at] < data.r_before[at]) {
    shapes.push({ type: "line", xref: "x", yref: "paper", x0: data.r[at], x1: data.r[at], y0: 0, y1: 1, line: { color: colour("cut"), width: 1.5, dash: "dot" } });
    annotations.push({ ...text, x: logarithmic ? Math.log10(data.r[at]) : data.r[at], xref: "x", y: 1, yref: "paper", xanchor: "right", yanchor: "top", text: `cut to ${data.r[at]} `, font: { size: 12, color: colour("cut") } });
  }
  const edge = data.noise_edge[at];
  if (edge !== null) {
    shapes.push({ type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: edge, y1: edge, line: { color: colour("edge"), width: 1.2, dash: "dash" } });
    annotations.push({ ...text, x: 0, xref: "paper", y: Math.log10(edge), yref: "y", xanchor: "left", yanchor: "bottom", text: " noise edge" });
  }
  return { shapes, annotations };
}

function tellEvent() {
  const { data } = spectrumView;
  const at = Number(byId("event").value);
  const cut = data.r_before[at] - data.r[at];
  const parts = [`step ${data.step[at]}: ${data.kind[at]}`];
  parts.push(cut > 0 ? `r ${data.r_before[at]} \u2192 ${data.r[at]}` : `r ${data.r[at]}`);
  if (data.above[at] !== null) parts.push(`${data.above[at]} ${data.above[at] === 1 ? "value" : "values"} above the noise edge`);
  byId("event-text").textContent = parts.join(", ");
  byId("event").setAttribute("aria-valuetext", parts.join(", "));
}
