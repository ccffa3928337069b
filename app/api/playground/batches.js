// Images in batches that the server accepts in one request.

// Few, so that results appear soon and progress is smooth; the server batches the images of all requests.
const MAX_IMAGES = 16;
const MAX_BYTES = 32 * 2 ** 20;

/** Return the first entries, {file}, that fit into one request; `limits` are the `images` of GET /v1/models. */
export function firstBatch(entries, limits, maxImages = MAX_IMAGES) {
  const most = Math.min(maxImages, limits.max_per_request ?? MAX_IMAGES);
  let bytes = 0, count = 0;
  while (count < entries.length && count < most) {
    bytes += entries[count].file?.size ?? 0;
    if (count && bytes > MAX_BYTES) break;
    count += 1;
  }
  return entries.slice(0, count);
}

/** Return all entries in batches that fit into one request each. */
export function batchesOf(entries, limits) {
  const batches = [];
  for (let taken = 0; taken < entries.length; taken += batches.at(-1).length) batches.push(firstBatch(entries.slice(taken, taken + MAX_IMAGES), limits));
  return batches;
}
