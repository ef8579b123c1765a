// What all charts share.

const byId = (id) => document.getElementById(id);
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };

/** Names go to the library as text: it would take "<" for a tag. */
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zeroline: false,
    ...more,
  };
}

function layout(x, y, more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 13, color: colour("ink") },
    margin: { l: 74, r: 14, t: 10, b: 46 },
    hovermode: "closest",
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
    showlegend: false,
    xaxis: x,
    yaxis: y,
    ...more,
  };
}

/** Draw a chart; one without a point is left out together with its head. */
function draw(id, traces, shape) {
  const empty = !traces.some((trace) => trace.z || trace.x.length);
  byId(id).closest("figure").hidden = empty;
  if (empty) return null;
  return Plotly.react(id, traces, shape, CONFIG);
}

/** A logarithmic axis with labels at 1, 2, 5, or at powers where these would crowd. */
function logAxis(title, values, more = {}) {
  const known = values.filter((value) => value > 0);
  const decades = Math.log10(Math.max(...known) / Math.min(...known));
  const ticks = decades > 3 ? { dtick: Math.ceil(decades / 6) } : { dtick: "D2" };
  return axis(title, { type: "log", tickformat: decades > 3 ? "" : "~g", exponentformat: "power", ...ticks, ...more });
}

function isAccuracy(name) {
  return name.endsWith("accuracy");
}

/** Zoom about the middle by keyboard or pointer; dragging in a chart zooms too, a double click resets. */
function zoom(id, factor) {
  const { xaxis, yaxis } = document.getElementById(id)._fullLayout;
  const ranges = {};
  for (const [name, each] of [["xaxis", xaxis], ["yaxis", yaxis]]) {
    const [from, to] = each.range;
    const middle = (from + to) / 2;
    ranges[`${name}.range`] = [middle + (from - middle) * factor, middle + (to - middle) * factor];
  }
  Plotly.relayout(id, ranges);
}

for (const place of document.querySelectorAll(".zoom")) {
  const id = place.dataset.chart;
  const actions = [["+", "Zoom in", () => zoom(id, 0.6)], ["\u2212", "Zoom out", () => zoom(id, 1 / 0.6)], ["Reset", "Reset the zoom", () => CHARTS[id]()]];
  for (const [text, label, act] of actions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", act);
    place.append(button);
  }
}
