// The ways in which images come in: pick, photograph, drop, paste, and the samples. Knows nothing of what becomes of
// them; `onFiles` gets a list of files, `onTrouble` a sentence.

const $ = (id) => document.getElementById(id);

export function listenForImages(onFiles, onTrouble) {
  listenForPicks(onFiles);
  listenForDrops(onFiles, onTrouble);
  listenForPastes(onFiles, onTrouble);
  listenForPhotos(onFiles, onTrouble);
}

/** Offer images that the model knows, `{label, image}` with a PNG in base64; where there are none, hide their place. */
export function offerSamples(samples, onFiles) {
  for (const picture of $("samples").querySelectorAll("img")) URL.revokeObjectURL(picture.src);
  $("samples").replaceChildren(...samples.map((sample) => sampleItem(sample, onFiles)));
  $("samples").parentElement.hidden = !samples.length;
}

function sampleItem({ label, image }, onFiles) {
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  const file = new File([bytes], `${label}.png`, { type: "image/png" });
  const picture = Object.assign(new Image(), { alt: label, src: URL.createObjectURL(file) });
  const button = Object.assign(document.createElement("button"), { type: "button", onclick: () => onFiles([file]) });
  const item = document.createElement("li");
  button.append(picture);
  item.append(button);
  return item;
}

function listenForPicks(onFiles) {
  $("pick").addEventListener("click", () => $("files").click());
  for (const input of [$("files"), $("capture")]) {
    input.addEventListener("change", () => {
      const files = [...input.files];
      input.value = ""; // so that the same file can be chosen again
      if (files.length) onFiles(files);
    });
  }
}

function listenForDrops(onFiles, onTrouble) {
  let depth = 0; // dragenter and dragleave also come for every child that is crossed
  const show = () => $("drop").classList.toggle("is-over", depth > 0);
  addEventListener("dragenter", (event) => {
    event.preventDefault();
    depth += 1;
    show();
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    show();
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    show();
    const files = [...event.dataTransfer.files];
    if (files.length) onFiles(files);
    else onTrouble("Only files can be dropped here. Save the image first, then drop the file.");
  });
}

/** By the keyboard, and by a button where there is none; without https a browser gives a page no clipboard to read. */
function listenForPastes(onFiles, onTrouble) {
  $("paste").hidden = !navigator.clipboard?.read;
  $("paste").addEventListener("click", async () => {
    try {
      const files = await filesOf(await navigator.clipboard.read());
      if (files.length) onFiles(files);
      else onTrouble("There is no image in the clipboard. Copy one, then paste it.");
    } catch {
      onTrouble("The browser may not read the clipboard. Allow it for this page, or choose the image as a file.");
    }
  });
  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    onFiles(files);
  });
}

async function filesOf(clipboardItems) {
  const files = [];
  for (const item of clipboardItems) {
    const type = item.types.find((each) => each.startsWith("image/"));
    if (type) files.push(new File([await item.getType(type)], `image.${type.slice(6)}`, { type }));
  }
  return files;
}

function listenForPhotos(onFiles, onTrouble) {
  const dialog = $("camera");
  const video = $("camera-video");

  $("photograph").addEventListener("click", async () => {
    // A phone's own camera is better than ours; and without https a browser gives a page no camera at all.
    if (!navigator.mediaDevices?.getUserMedia || matchMedia("(pointer: coarse)").matches) {
      $("capture").click();
      return;
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      dialog.showModal();
    } catch (error) {
      onTrouble(cameraTrouble(error));
    }
  });
  $("camera-close").addEventListener("click", () => dialog.close());
  $("shoot").addEventListener("click", async () => {
    const photo = await photograph(video);
    dialog.close();
    if (photo) onFiles([photo]);
  });
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

async function photograph(video) {
  if (!video.videoWidth) return null;
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  return new File([blob], "photo.jpg", { type: blob.type });
}

function cameraTrouble(error) {
  if (error.name === "NotAllowedError") return "The browser may not use the camera. Allow it for this page, then try again.";
  if (error.name === "NotFoundError") return "There is no camera on this device. Choose an image instead.";
  return "The camera does not work just now; another program may be using it.";
}
