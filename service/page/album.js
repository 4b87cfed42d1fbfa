// Several images at once: a list of them with their answers, one of them chosen. Knows nothing of requests.

import { percent } from "./result.js";

const $ = (id) => document.getElementById(id);

/** Show `items` as they come; `onChoose` is called with the item that somebody chooses. */
export function showAlbum(items, onChoose) {
  $("album").hidden = items.length < 2;
  $("album-items").replaceChildren(
    ...items.map((item) => {
      item.tile = makeTile(item, onChoose);
      const row = document.createElement("li");
      row.append(item.tile);
      return row;
    }),
  );
}

/** Bring an item's tile up to date with its answer or error. */
export function refreshTile(item) {
  if (!item.tile) return;
  const [name, score] = item.tile.querySelectorAll(".text");
  item.tile.classList.toggle("is-bad", Boolean(item.error));
  const best = item.answer?.predictions[0];
  const isUnknown = item.answer?.known === false;
  name.textContent = item.error ? "no answer" : isUnknown ? "not known" : (best?.label ?? "…");
  score.textContent = best ? `${isUnknown ? `${best.label}? ` : ""}${percent(best.score)}` : "";
}

export function markTile(items, chosen) {
  for (const item of items) item.tile?.setAttribute("aria-pressed", String(item === chosen));
}

export function setAlbumTitle(text) {
  $("album-title").textContent = text;
}

function makeTile(item, onChoose) {
  const image = document.createElement("img");
  image.src = item.url;
  image.alt = item.file.name;
  image.loading = "lazy";
  image.addEventListener("error", () => image.replaceWith(makeSpan("no-picture", item.file.name))); // not an image at all
  const button = document.createElement("button");
  button.type = "button";
  button.title = item.file.name;
  button.setAttribute("aria-pressed", "false");
  button.append(image, makeSpan("text"), makeSpan("text"));
  button.addEventListener("click", () => onChoose(item));
  return button;
}

function makeSpan(className, text = "") {
  const span = document.createElement("span");
  span.className = className;
  span.textContent = text;
  return span;
}
