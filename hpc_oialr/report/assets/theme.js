// Light, dark, and the colours of charts.

const THEMES = ["system", "light", "dark"];
const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");
const redraws = [];
let theme = "system";
let colours = {};

function isDark() {
  return theme === "dark" || (theme === "system" && systemIsDark.matches);
}

function applyTheme() {
  colours = {};
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  document.getElementById("theme").textContent = `Theme: ${theme}`;
  for (const redraw of redraws) redraw();
}

/** A colour of page.css; asked for once a theme, as each look makes the browser work out all styles. */
function colour(name) {
  colours[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return colours[name];
}

// Okabe and Ito's colours; on dark paper the ones that are lost there give way to their lighter fellows.
const ON_LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
const ON_DARK = ["#56B4E9", "#E69F00", "#2CC79A", "#E5A3C6", "#F0E442", "#FF8A3D", "#FFFFFF"];

function runColour(number) {
  const colours = isDark() ? ON_DARK : ON_LIGHT;
  return colours[number % colours.length];
}

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
];

/** Viridis between 0 and 1, without the end that is lost on the paper. */
function shade(share) {
  const [from, to] = isDark() ? [0.25, 1] : [0, 0.88];
  const place = (from + (to - from) * share) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mix = VIRIDIS[low].map((part, i) => Math.round(part + (VIRIDIS[low + 1][i] - part) * (place - low)));
  return `rgb(${mix.join(",")})`;
}

function shades() {
  return Array.from({ length: 11 }, (_, i) => [i / 10, shade(i / 10)]);
}

document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  applyTheme();
});
systemIsDark.addEventListener("change", applyTheme);
