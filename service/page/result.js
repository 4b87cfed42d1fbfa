// The result of one image: verdict, pictures, a bar for every class, times. Draws what it is given and asks for a class's
// heatmap by `onClass`; knows nothing of requests.

import { clearHeatmap, drawHeatmap, strongestPlace } from "./heatmap.js";

const $ = (id) => document.getElementById(id);
const UNSURE = 0.5;

/** Show an image that is being classified. */
export function showPending(item, classes) {
  $("result").hidden = false;
  $("result").setAttribute("aria-busy", "true");
  $("result").classList.remove("is-unknown");
  $("result-title").textContent = "Looking…";
  $("result-guess").hidden = true;
  $("result-name").textContent = item.file.name;
  $("picture").src = item.url;
  $("picture").alt = `The image ${item.file.name}`;
  $("view").removeAttribute("src");
  $("view").alt = "";
  $("view-size").textContent = "";
  clearHeatmap($("heatmap"));
  $("heatmap-text").textContent = "Where it looked";
  const rows = Array.from({ length: classes }, () => makeRow({ label: "\u00a0", score: 0 }));
  showRows(rows); // of the same height as those that will take their place
  $("timing").classList.add("is-pending");
}

/** Bring the result into sight where it has appeared below the screen's edge. */
export function reveal() {
  const { top } = $("result").getBoundingClientRect();
  if (top < 0.6 * innerHeight) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  $("result").scrollIntoView({ behavior });
}

export function hideResult() {
  $("result").hidden = true;
}

/** Show the answer; `onClass` is called with the label of a class that somebody chooses. */
export function showAnswer(item, onClass) {
  const { predictions, known } = item.answer;
  const { label, score } = predictions[0];
  $("result").removeAttribute("aria-busy");
  const title = $("result-title");
  const isUnknown = known === false;
  $("result").classList.toggle("is-unknown", isUnknown);
  if (isUnknown) title.textContent = unknownSentence(item);
  else title.replaceChildren(score < UNSURE ? "Perhaps " : "", strong(label), " ", span(percent(score), "score"));
  $("result-guess").hidden = !isUnknown;
  $("result-guess").textContent = isUnknown ? `Best guess: ${label}, ${percent(score)}` : "";
  showRows(predictions.map((prediction) => makeRow(prediction, onClass)));
  showTiming(item);
}

function showRows(rows) {
  $("scores").replaceChildren(...rows);
  $("scores").classList.toggle("is-long", rows.length > 20);
}

function unknownSentence({ answer }) {
  return `This does not look like any of the ${answer.predictions.length} kinds I know`;
}

/** Show the PNG of what the network sees, once the browser has it. */
export async function showView(url) {
  const image = $("view");
  image.src = url;
  await image.decode();
  image.alt = `The image at ${image.naturalWidth} by ${image.naturalHeight} pixels`;
  $("view-size").textContent = `, ${image.naturalWidth}\u00a0×\u00a0${image.naturalHeight}`;
}

/** Say that the heatmap of `label` is on its way. */
export function markClass(label) {
  for (const button of $("scores").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.label === label));
  }
}

export function showHeatmap(label, heatmap) {
  drawHeatmap($("heatmap"), $("view"), heatmap);
  const place = strongestPlace(heatmap);
  const text = place ? `Where it found ${label}: ${place}` : `Nothing here speaks for ${label}`;
  $("heatmap-text").textContent = text;
}

export function showNoHeatmap(message) {
  clearHeatmap($("heatmap"));
  $("heatmap-text").textContent = message;
}

/** Say the answer in one sentence, for those who listen. */
export function sentenceOf(item) {
  const [first, second] = item.answer.predictions;
  const unknown = item.answer.known === false ? `${unknownSentence(item)}. Best guess: ` : "";
  const name = `${item.file.name}: ${unknown}${first.label}, ${percent(first.score)}.`;
  return second ? `${name} Then ${second.label}, ${percent(second.score)}.` : name;
}

export function percent(score) {
  if (score > 0 && score < 0.001) return "< 0.1 %";
  return `${(100 * score).toFixed(1)} %`;
}

function makeRow({ label, score }, onClass) {
  const fill = span("", "fill");
  fill.style.setProperty("--score", score);
  const track = span("", "track");
  track.append(fill);
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.label = label;
  button.setAttribute("aria-pressed", "false");
  button.append(span(label, "name"), track, span(onClass ? percent(score) : "", "percent"));
  button.disabled = !onClass; // the answer is on its way
  button.addEventListener("click", () => onClass(label));
  const row = document.createElement("li");
  row.append(button);
  return row;
}

function showTiming({ totalMs, parts, batchSize }) {
  const known = totalMs != null;
  $("timing").hidden = !known;
  $("timing").classList.remove("is-pending");
  if (!known) return;
  const inService = parts.reduce((sum, { ms }) => sum + ms, 0);
  const shown = [...parts, { name: "transfer", ms: Math.max(0, totalMs - inService) }];
  const batch = batchSize > 1 ? `, in a batch of ${batchSize} images` : "";
  $("timing-total").textContent = `${milliseconds(totalMs)}${batch}`;
  $("timing-bar").replaceChildren(
    ...shown.map(({ name, ms }) => {
      const part = span("", `part part-${name}`);
      part.style.flexGrow = ms;
      return part;
    }),
  );
  $("timing-parts").replaceChildren(...shown.map(makePart));
}

function makePart({ name, ms }) {
  const part = document.createElement("div");
  part.className = `part-${name}`;
  const term = document.createElement("dt");
  term.textContent = name;
  const value = document.createElement("dd");
  value.textContent = milliseconds(ms);
  part.append(term, value);
  return part;
}

function milliseconds(ms) {
  return `${ms < 10 ? ms.toFixed(2) : ms.toFixed(0)} ms`;
}

function strong(text) {
  const element = document.createElement("strong");
  element.textContent = text;
  return element;
}

function span(text, className) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}
