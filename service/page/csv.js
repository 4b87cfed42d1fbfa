// The results as CSV (RFC 4180), with the columns of `python -m service predict --format csv`.

const PLACES = 5;

/** Return the text for items that have an answer or an error. */
export function csvOf(items) {
  const places = Math.min(PLACES, Math.max(1, ...items.map(({ answer }) => answer?.predictions.length ?? 0)));
  const numbers = Array.from({ length: places }, (_, index) => (index ? `_${index + 1}` : ""));
  const header = ["file", ...numbers.flatMap((number) => [`label${number}`, `score${number}`]), "known", "typicality", "error"];
  const rows = items.filter(({ answer, error }) => answer || error).map((item) => rowOf(item, places));
  return [header, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

function rowOf({ file, answer, error }, places) {
  if (!answer) return [file.name, ...Array(2 * places + 2).fill(""), error];
  const classes = answer.predictions.slice(0, places).flatMap(({ label, score }) => [label, score]);
  const known = { true: "yes", false: "no" }[answer.known] ?? "";
  return [file.name, ...classes, ...Array(2 * places - classes.length).fill(""), known, answer.typicality ?? "", ""];
}

function cell(value) {
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Hand `text` to the person as a file of this name. */
export function save(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // long after the browser has read it
}
