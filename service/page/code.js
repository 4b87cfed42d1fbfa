// "Use it from code": the request for the chosen image in curl, Python and JavaScript, to this very service.

const $ = (id) => document.getElementById(id);

/** Show the snippets for an image of this name; with `withKey` they carry an API key, which is not shown. */
export function showCode(name, withKey) {
  const url = new URL("predict", document.baseURI).href;
  const file = JSON.stringify(name);
  $("code-curl").textContent = `curl ${withKey ? "-H 'X-API-Key: KEY' " : ""}-F ${quoted(`file=@"${name}"`)} ${quoted(url)}`;
  $("code-python").textContent = [
    "import httpx  # pip install httpx",
    "",
    `with open(${file}, "rb") as file:`,
    `    response = httpx.post("${url}", files={"file": file}${withKey ? ', headers={"X-API-Key": "KEY"}' : ""})`,
    "answer = response.raise_for_status().json()",
    'print(answer["label"], answer["score"])',
  ].join("\n");
  $("code-javascript").textContent = [
    "// `file` is a File, such as input.files[0]; other origins need the setting cors_origins",
    "const body = new FormData();",
    'body.append("file", file);',
    `const response = await fetch("${url}", { method: "POST", body${withKey ? ', headers: { "X-API-Key": "KEY" }' : ""} });`,
    "const answer = await response.json();",
    "console.log(answer.label, answer.score);",
  ].join("\n");
}

/** Let each "Copy" button copy the snippet beside it; without a clipboard there are none. */
export function listenForCopies() {
  for (const button of document.querySelectorAll("#code button")) {
    button.hidden = !navigator.clipboard?.writeText;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText($(button.dataset.copies).textContent);
      button.textContent = "Copied";
    });
  }
}

/** Quote for a POSIX shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
