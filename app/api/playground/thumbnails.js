// Small copies of images, so that hundreds of photographs fit into the memory of the tab.

// Of the longer side, twice the width of a card on a screen of usual density.
const SIZE_PX = 480;
const QUALITY = 0.8;
const AT_ONCE = 2;

/** Return {add, remove}; `changed` is called whenever a picture has its thumbnail, or is known to have none. */
export function createThumbnails(changed) {
  const waiting = [];
  let running = 0;

  async function next() {
    if (running >= AT_ONCE || !waiting.length) return;
    running += 1;
    const picture = waiting.shift();
    try {
      const blob = await thumbnailOf(picture.file);
      if (!picture.isRemoved) picture.url = URL.createObjectURL(blob);
    } catch {
      picture.hasNoThumbnail = true; // a format that this browser cannot show, or a broken file
    }
    running -= 1;
    changed();
    next();
  }

  return {
    add(picture) {
      waiting.push(picture);
      next();
    },
    remove(picture) {
      picture.isRemoved = true;
      const place = waiting.indexOf(picture);
      if (place >= 0) waiting.splice(place, 1);
      if (picture.url) URL.revokeObjectURL(picture.url);
    },
  };
}

async function thumbnailOf(file) {
  const image = await createImageBitmap(file, { resizeWidth: SIZE_PX, resizeQuality: "medium" });
  try {
    const canvas = new OffscreenCanvas(image.width, image.height);
    canvas.getContext("2d", { alpha: true }).drawImage(image, 0, 0);
    return await canvas.convertToBlob({ type: "image/webp", quality: QUALITY });
  } finally {
    image.close();
  }
}
