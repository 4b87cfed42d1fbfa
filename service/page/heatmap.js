// Drawing where the network looked: the image in grey, with colour where something speaks for the class.

const COLOUR = [255, 140, 20];
const STRENGTH = 0.85; // of the colour where the map is 1; the image stays visible under it
const DIMMED = 0.6; // so that the colour stands out from a bright image too

/** Draw `heatmap`, rows of 0 to 1, over `image` onto the square `canvas`. */
export function drawHeatmap(canvas, image, heatmap) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(greyOf(image), 0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true; // the map has no pixels of its own: it is a smooth surface over those of the image
  context.drawImage(colourOf(heatmap), 0, 0, canvas.width, canvas.height);
}

export function clearHeatmap(canvas) {
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

function greyOf(image) {
  const [layer, context] = makeLayer(image.naturalWidth, image.naturalHeight);
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, layer.width, layer.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const [red, green, blue] = pixels.data.subarray(at, at + 3);
    pixels.data.fill(DIMMED * (0.3 * red + 0.59 * green + 0.11 * blue), at, at + 3);
  }
  context.putImageData(pixels, 0, 0);
  return layer;
}

function colourOf(heatmap) {
  const [layer, context] = makeLayer(heatmap.length, heatmap.length);
  const pixels = context.createImageData(layer.width, layer.height);
  heatmap.flat().forEach((value, index) => pixels.data.set([...COLOUR, 255 * STRENGTH * value], 4 * index));
  context.putImageData(pixels, 0, 0);
  return layer;
}

function makeLayer(width, height) {
  const layer = document.createElement("canvas");
  Object.assign(layer, { width, height });
  return [layer, layer.getContext("2d")];
}

/** Say in words where `heatmap` is strongest; null when it is 0 everywhere. */
export function strongestPlace(heatmap) {
  const size = heatmap.length;
  const values = heatmap.flat();
  const peak = Math.max(...values);
  if (!peak) return null;
  const at = values.indexOf(peak);
  const vertical = ["top", "middle", "bottom"][third((Math.floor(at / size) + 0.5) / size)];
  const horizontal = ["left", "centre", "right"][third(((at % size) + 0.5) / size)];
  if (vertical === "middle") return horizontal;
  return horizontal === "centre" ? vertical : `${vertical} ${horizontal}`;
}

function third(share) {
  return Math.floor(3 * share);
}
