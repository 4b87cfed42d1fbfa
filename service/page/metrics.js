// Prometheus's text format to the few numbers that the live panel needs. Knows nothing of the page.

const PREDICTING = /^\/(predict|hf)|\/infer$/; // the routes whose latency counts

/** Take from the text of /metrics the counters at this moment. */
export function snapshotOf(text, atMs) {
  const snapshot = { atMs, images: 0, batches: 0, batchImages: 0, latency: new Map() };
  for (const { name, labels, value } of samplesIn(text)) {
    if (name === "service_predictions_total") snapshot.images += value;
    else if (name === "service_batch_images_count") snapshot.batches += value;
    else if (name === "service_batch_images_sum") snapshot.batchImages += value;
    else if (name === "service_request_seconds_bucket" && PREDICTING.test(labels.route)) {
      const limit = labels.le === "+Inf" ? Infinity : Number(labels.le);
      snapshot.latency.set(limit, (snapshot.latency.get(limit) ?? 0) + value);
    }
  }
  return snapshot;
}

/** Give what happened between two snapshots; null for what cannot be said because nothing happened. */
export function ratesBetween(before, after) {
  const batches = after.batches - before.batches;
  const buckets = [...after.latency]
    .sort(([a], [b]) => a - b)
    .map(([limit, count]) => [limit, count - (before.latency.get(limit) ?? 0)]);
  return {
    throughput: ((after.images - before.images) / (after.atMs - before.atMs)) * 1000,
    batch: batches > 0 ? (after.batchImages - before.batchImages) / batches : null,
    median: quantileMs(buckets, 0.5),
    p95: quantileMs(buckets, 0.95),
  };
}

/** Interpolate within the bucket that holds the quantile, as Prometheus's histogram_quantile does. */
function quantileMs(buckets, quantile) {
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const rank = quantile * total;
  let lower = 0;
  let below = 0;
  for (const [limit, count] of buckets) {
    if (count >= rank) {
      if (limit === Infinity) return lower * 1000;
      return (lower + ((limit - lower) * (rank - below)) / Math.max(count - below, 1e-9)) * 1000;
    }
    [lower, below] = [limit, count];
  }
  return lower * 1000;
}

function* samplesIn(text) {
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const pairs = [...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)];
    yield { name: match[1], labels: Object.fromEntries(pairs.map(([, name, value]) => [name, value])), value: Number(match[3]) };
  }
}
