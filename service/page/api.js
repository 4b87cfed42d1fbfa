// The service's API: requests, answers, errors in words. Knows no element of the page.

const KEY = "api-key";

/** An error that the service explained, or that kept it from answering; the message is for people. */
export class Problem extends Error {
  constructor(message, { status = 0, code = "unreachable" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }

  /** Whether the same request may well succeed in a moment. */
  get isPassing() {
    return [0, 429, 503, 504].includes(this.status);
  }
}

/** Send this API key with every request of this tab. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

export async function health() {
  return (await request("health", {}, [200, 503])).json();
}

export async function labels() {
  return (await (await request("labels")).json()).labels;
}

/** Give images that the model knows: label, and PNG in base64. */
export async function samples() {
  return (await (await request("samples")).json()).samples;
}

export async function metrics() {
  return (await request("metrics")).text();
}

/** Classify one image: the answer with every class, its times in milliseconds, and the size of its batch. */
export async function predict(file, classes, signal) {
  const began = performance.now();
  const response = await request(`predict?top_k=${classes}`, { method: "POST", body: formOf([file]), signal });
  const answer = await response.json();
  return {
    answer,
    totalMs: performance.now() - began,
    parts: serverTiming(response.headers.get("Server-Timing") ?? ""),
    batchSize: Number(response.headers.get("X-Batch-Size")),
  };
}

/** Classify several images: one entry for each, an answer or `{filename, error}`. */
export async function predictBatch(files, classes, signal) {
  const response = await request(`predict/batch?top_k=${classes}`, { method: "POST", body: formOf(files), signal });
  return (await response.json()).results;
}

/** Give the image as the network sees it, a PNG of a few pixels. */
export async function view(file, signal) {
  return (await request("view", { method: "POST", body: formOf([file]), signal })).blob();
}

/** Give where the network found what speaks for `label` in an image: rows of numbers from 0 to 1. */
export async function explain(image, label, signal) {
  const query = new URLSearchParams({ label });
  return (await (await request(`explain?${query}`, { method: "POST", body: image, signal })).json()).heatmap;
}

function formOf(files) {
  const form = new FormData();
  for (const file of files) form.append("file", file, file.name);
  return form;
}

async function request(path, options = {}, expected = null) {
  const headers = new Headers();
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("X-API-Key", key);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached. Check that it is running, then try again.");
  }
  if (expected ? expected.includes(response.status) : response.ok) return response;
  throw await problemOf(response);
}

async function problemOf(response) {
  const { status } = response;
  try {
    const { code, detail } = await response.json();
    return new Problem(sentence(detail), { status, code });
  } catch {
    return new Problem(`The service answered with status ${status} and did not say why.`, { status, code: "unknown" });
  }
}

/** Make a sentence of an error's detail. */
export function sentence(detail) {
  return `${detail[0].toUpperCase()}${detail.slice(1)}${/[.!?]$/.test(detail) ? "" : "."}`;
}

/** Parse `decode;dur=0.3, queue;dur=0.1` (W3C Server Timing) to a list of name and milliseconds. */
function serverTiming(header) {
  return [...header.matchAll(/([\w-]+)[^,]*?;\s*dur=([\d.]+)/g)].map(([, name, ms]) => ({ name, ms: Number(ms) }));
}
