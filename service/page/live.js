// The live panel and the line about the model, asked for every two seconds while somebody can see the page.

import { health, metrics } from "./api.js";
import { ratesBetween, snapshotOf } from "./metrics.js";

const INTERVAL_MS = 2000;
const WINDOW_MS = 10_000; // what the numbers speak of
const POINTS = 60; // columns under each number: two minutes
const FIGURES = ["throughput", "batch", "median", "p95"];

const $ = (id) => document.getElementById(id);

/** Begin; `onState` hears the service's health, or null while it cannot be reached. */
export function watchService(onState) {
  const snapshots = [];
  const series = Object.fromEntries(FIGURES.map((name) => [name, []]));

  async function look() {
    await Promise.all([lookAtHealth(onState), lookAtMetrics(snapshots, series)]);
    setTimeout(whenVisible, INTERVAL_MS);
  }

  function whenVisible() {
    if (!document.hidden) look();
    else document.addEventListener("visibilitychange", look, { once: true });
  }

  look();
}

async function lookAtHealth(onState) {
  const line = $("model");
  try {
    const state = await health();
    line.dataset.state = state.status;
    const model = state.model ? `${state.model.name} ${state.model.version}` : "no model yet";
    const where = state.runtime ? `, ${state.runtime} on ${state.device}` : "";
    $("model-text").textContent = `${state.status === "ready" ? "" : `${state.status}: `}${model}${where}`;
    onState(state);
  } catch {
    line.dataset.state = "unreachable";
    $("model-text").textContent = "The service cannot be reached";
    onState(null);
  }
}

async function lookAtMetrics(snapshots, series) {
  try {
    const now = snapshotOf(await metrics(), performance.now());
    const last = snapshots.at(-1);
    if (last && now.images < last.images) snapshots.length = 0; // the service started again
    snapshots.push(now);
    if (snapshots.length > 1) {
      const recent = ratesBetween(snapshots.at(-2), now);
      for (const name of FIGURES) {
        series[name].push(recent[name]);
        series[name].splice(0, series[name].length - POINTS);
        drawColumns($(`spark-${name}`), series[name]);
      }
      while (snapshots.length > 2 && now.atMs - snapshots[1].atMs >= WINDOW_MS) snapshots.shift();
      show(ratesBetween(snapshots[0], now));
    }
    $("live-note").textContent = ", over the last 10 seconds";
  } catch (problem) {
    snapshots.length = 0;
    show({});
    $("live-note").textContent = problem.status === 401 ? " needs an API key" : ": its figures cannot be read";
  }
}

function show(rates) {
  for (const name of FIGURES) $(`live-${name}`).textContent = figure(rates[name]);
}

/** Write a figure in three digits or so. */
export function figure(value) {
  if (value == null) return "–";
  if (value === 0) return "0";
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Draw a column for each value, the newest on the right; none for a value that is not known. */
function drawColumns(place, values) {
  const svgns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(svgns, "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  const top = Math.max(...values.map((value) => value ?? 0), 1e-9);
  const start = POINTS - values.length;
  const columns = document.createElementNS(svgns, "path");
  const column = (value, index) => (value ? `M${start + index} 20V${20 - (19 * value) / top}h.7V20z` : "");
  columns.setAttribute("d", values.map(column).join(""));
  svg.append(columns);
  place.replaceChildren(svg);
}
