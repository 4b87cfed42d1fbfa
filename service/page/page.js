// The page: images come in, requests go out, answers are shown. Owns the order of things; how each is done is in the modules.

import { markTile, refreshTile, setAlbumTitle, showAlbum } from "./album.js";
import { explain, hasKey, labels, predict, predictBatch, Problem, samples, sentence, setKey, view } from "./api.js";
import { listenForCopies, showCode } from "./code.js";
import { csvOf, save } from "./csv.js";
import { listenForImages, offerSamples } from "./intake.js";
import { watchService } from "./live.js";
import * as result from "./result.js";

const $ = (id) => document.getElementById(id);

// A request of many images is cut into several, so that none comes near the service's limits.
const IMAGES_PER_REQUEST = 64;
const BYTES_PER_REQUEST = 8 * 2 ** 20;

let classes = null; // the labels of the model that serves; null until they are known
let version = null; // of that model
let items = []; // {file, url, answer, error, totalMs, parts, batchSize, viewBlob, viewUrl, tile}
let chosen = null;
let work = new AbortController(); // what is under way for `items`
let wanted = null; // the class whose heatmap somebody waits for
let choice = new AbortController(); // what is under way for `chosen`

function take(files) {
  work.abort();
  choice.abort();
  work = new AbortController();
  for (const item of items) {
    URL.revokeObjectURL(item.url);
    if (item.viewUrl) URL.revokeObjectURL(item.viewUrl);
  }
  items = files.map((file) => ({ file, url: URL.createObjectURL(file) }));
  chosen = null;
  hideAlert();
  $("after").hidden = false;
  $("csv").disabled = true;
  showCode(files[0].name, hasKey());
  showAlbum(items, choose);
  const { signal } = work;
  attempt(() => (items.length === 1 ? classifyOne(items[0], signal) : classifyAll(items, signal)), signal, files);
}

/** Do `job`; when it fails while `signal` says it matters, say why, and offer to take `files` again if that may help. */
async function attempt(job, signal, files = null) {
  try {
    await job();
  } catch (error) {
    if (signal.aborted) return;
    if (!chosen?.answer) result.hideResult();
    showAlert(error, files);
  }
}

async function classifyOne(item, signal) {
  chosen = item;
  result.showPending(item, classes?.length ?? 0);
  result.reveal();
  const answer = await withClasses((count) => predict(item.file, count, signal));
  signal.throwIfAborted();
  Object.assign(item, answer);
  choose(item);
}

async function classifyAll(all, signal) {
  result.showPending(all[0], classes?.length ?? 0);
  const began = performance.now();
  let done = 0;
  setAlbumTitle(`0 of ${all.length} images`);
  for (const part of inParts(all)) {
    await classifyPart(part, signal);
    part.forEach(refreshTile);
    done += part.length;
    setAlbumTitle(`${done} of ${all.length} images`);
    const answered = part.find((item) => item.answer);
    if (!chosen && answered) choose(answered);
  }
  if (!chosen) choose(all[0]);
  const tookMs = performance.now() - began;
  const failed = all.filter((item) => item.error).length;
  const trouble = failed ? `, ${failed} without an answer` : "";
  const text = `${all.length} images in ${Math.round(tookMs)} ms${trouble}`;
  setAlbumTitle(text);
  announce(text);
}

/** Answer a part of an album. When it is refused as a whole, its images go one by one, so that only the unfit ones fail. */
async function classifyPart(part, signal) {
  const files = part.map((item) => item.file);
  let entries;
  try {
    entries = await withClasses((count) => predictBatch(files, count, signal));
  } catch (error) {
    if (signal.aborted || !(await isAboutTheFiles(error, files))) throw error;
    if (part.length === 1) part[0].error = error.status ? error.message : "The service cut it off: it may be too large.";
    else for (const item of part) await classifyPart([item], signal);
    return;
  }
  signal.throwIfAborted();
  part.forEach((item, index) => {
    const { error, ...answer } = entries[index];
    Object.assign(item, error ? { error: sentence(error.detail) } : { answer });
  });
}

/** Whether files are to blame: refused, or cut off while they were sent by a service that is there for smaller ones. */
async function isAboutTheFiles(error, files) {
  if ([400, 413, 415, 422].includes(error.status)) return true;
  const isLarge = files.reduce((sum, { size }) => sum + size, 0) > BYTES_PER_REQUEST;
  return error.status === 0 && isLarge && labels().then(() => true, () => false);
}

/** Ask with the number of classes; when another model has taken over in between, learn its classes and ask once more. */
async function withClasses(ask) {
  if (classes === null) await learnClasses();
  try {
    return await ask(classes.length);
  } catch (error) {
    if (error.code !== "invalid_parameter") throw error;
    await learnClasses();
    return ask(classes.length);
  }
}

async function learnClasses() {
  let known;
  [classes, known] = await Promise.all([labels(), samples()]);
  offerSamples(known, take);
}

function* inParts(all) {
  let part = [];
  let bytes = 0;
  for (const item of all) {
    if (part.length && (part.length === IMAGES_PER_REQUEST || bytes + item.file.size > BYTES_PER_REQUEST)) {
      yield part;
      [part, bytes] = [[], 0];
    }
    part.push(item);
    bytes += item.file.size;
  }
  if (part.length) yield part;
}

/** Show one item's result, and ask for its pictures. */
async function choose(item) {
  if (!item.answer && !item.error) return; // it is still on its way
  choice.abort();
  choice = new AbortController();
  const { signal } = choice;
  chosen = item;
  wanted = null;
  markTile(items, item);
  $("csv").disabled = false;
  showCode(item.file.name, hasKey());
  if (item.error) {
    result.hideResult();
    showAlert(new Problem(`${item.file.name}: ${item.error}`));
    return;
  }
  hideAlert();
  result.showPending(item, item.answer.predictions.length);
  result.showAnswer(item, (label) => attempt(() => look(item, label), signal));
  announce(result.sentenceOf(item));
  await attempt(async () => {
    item.viewBlob ??= await view(item.file, signal);
    item.viewUrl ??= URL.createObjectURL(item.viewBlob);
    if (signal.aborted) return;
    await result.showView(item.viewUrl);
    await look(item, wanted ?? item.answer.predictions[0].label);
  }, signal);
}

/** Show where the network found `label`. The few pixels that it sees are sent, not the whole image once more. */
async function look(item, label) {
  const { signal } = choice;
  wanted = label;
  result.markClass(label);
  if (!item.viewBlob) return;
  try {
    const heatmap = await explain(item.viewBlob, label, signal);
    if (!signal.aborted && label === wanted) result.showHeatmap(label, heatmap);
  } catch (error) {
    if (error.status !== 404) throw error;
    result.showNoHeatmap("This model’s answers cannot be explained");
  }
}

function showAlert(problem, files = null) {
  const needsKey = problem.status === 401;
  const text = problem instanceof Problem ? problem.message : "Something went wrong on this page. Load it again.";
  const isAboutTheImage = files?.length === 1 && [413, 415, 422, 500].includes(problem.status);
  $("alert-text").textContent = isAboutTheImage ? `${files[0].name}: ${text}` : text;
  $("key-form").hidden = !needsKey;
  $("retry").hidden = !files || needsKey || !problem.isPassing;
  $("retry").onclick = () => take(files);
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key").value = "";
    hideAlert();
    if (files) take(files);
  };
  $("alert").hidden = false;
  if (!(problem instanceof Problem)) console.error(problem);
}

function hideAlert() {
  $("alert").hidden = true;
}

function announce(text) {
  $("announcement").textContent = text;
}

/** Learn the classes when the service is there, and again when its model has changed. */
async function onState(state) {
  if (!state?.model || state.model.version === version) return;
  try {
    await learnClasses();
    version = state.model.version;
    $("lede-classes").textContent = ` that knows ${classes.length} kinds of things`;
  } catch {
    offerSamples([]); // asked again with the next image, where there is somebody to tell
  }
}

$("csv").addEventListener("click", () => save(csvOf(items), "results.csv"));
listenForCopies();
listenForImages(take, (text) => showAlert(new Problem(text)));
watchService(onState);
