// One picture in full: zooming, moving, going to the next picture, and cutting out a region of it.
import { create } from "./elements.js";
import { openModal } from "./modal.js";

const STEP = 1.25; // of one press of + or -
const MAX_ZOOM = 8; // screen pixels per pixel of the picture
const MOVE_PX = 40;
const MAX_CROP_SIDE_PX = 4096; // larger canvases fail on some phones
const MIN_REGION_PX = 8;
const JPEG_QUALITY = 0.95;

/**
 * Show a picture, {name, file, url}, in a dialog: its file, or what `url` has if there is none.
 *
 * `pictures` and `index` allow going to the others with the arrow keys. With `onCrop(file)`, a region can be selected,
 * which is cut out as a JPEG file named `name (region).jpg`. A picture without both, such as one that
 * the server fetches, cannot be shown.
 */
export function openLightbox(picture, { pictures = [picture], index = pictures.indexOf(picture), onCrop = null } = {}) {
  const image = create("img", { alt: "", draggable: false });
  const frame = create("div", { className: "region", hidden: true, tabIndex: 0, role: "group", "aria-label": "Region" });
  const failed = create("p", { className: "note", textContent: "The browser cannot show this file.", hidden: true });
  const stage = create("div", { className: "stage", tabIndex: 0, role: "group", "aria-label": "Image" }, image, frame, failed);
  const status = create("p", { className: "hint", role: "status" });
  const level = create("output", { className: "level", "aria-label": "Zoom" });
  const buttons = {
    previous: tool("‹", "Previous image (left arrow)", () => go(-1)), next: tool("›", "Next image (right arrow)", () => go(1)),
    out: tool("−", "Zoom out (-)", () => zoomBy(1 / STEP)), in: tool("+", "Zoom in (+)", () => zoomBy(STEP)), fit: tool("Fit", "Fit the window (0)", fit),
    region: create("button", { type: "button", className: "secondary", textContent: "Select a region", title: "Select a region (r)", "aria-pressed": "false", onclick: () => select(!region) }),
    crop: create("button", { type: "button", textContent: "Classify this region", hidden: true, onclick: crop }),
  };
  const { dialog, heading, close } = openModal(
    picture.name, { className: "lightbox", closed: end }, stage,
    create("div", { className: "actions" }, buttons.previous, buttons.next, buttons.out, level, buttons.in, buttons.fit, ...(onCrop ? [buttons.region, buttons.crop] : [])), status,
  );
  buttons.previous.hidden = buttons.next.hidden = pictures.length < 2;

  let at = Math.max(0, index); // the index of the shown picture
  let zoom = 1, left = 0, top = 0; // screen pixels per pixel of the picture, and the place of its corner in the stage
  let isFitted = true;
  let fileUrl = ""; // of the shown picture
  let region = null; // {x, y, width, height} in pixels of the picture

  // --- zoom and place ----------------------------------------------------------------------------------------------

  const fittingZoom = () => Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight, MAX_ZOOM / 2);

  function fit() {
    isFitted = true;
    zoom = fittingZoom();
    place();
  }

  function zoomBy(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const least = Math.min(fittingZoom(), 1), wanted = Math.min(MAX_ZOOM, Math.max(least, zoom * factor));
    left = x - (x - left) * (wanted / zoom);
    top = y - (y - top) * (wanted / zoom);
    zoom = wanted;
    isFitted = zoom <= least;
    place();
  }

  /** Keep the picture in the stage: centred where it is smaller, without a gap where it is larger. */
  function place() {
    if (!image.naturalWidth) return;
    left = kept(left, stage.clientWidth - zoom * image.naturalWidth);
    top = kept(top, stage.clientHeight - zoom * image.naturalHeight);
    image.style.width = `${zoom * image.naturalWidth}px`;
    image.style.height = `${zoom * image.naturalHeight}px`;
    image.style.transform = `translate(${left}px, ${top}px)`;
    level.textContent = `${Math.round(100 * zoom)} %`;
    if (!region) return;
    frame.style.width = `${zoom * region.width}px`;
    frame.style.height = `${zoom * region.height}px`;
    frame.style.transform = `translate(${left + zoom * region.x}px, ${top + zoom * region.y}px)`;
  }

  function moveBy(x, y) {
    left += x;
    top += y;
    isFitted = false;
    place();
  }

  // --- the picture -------------------------------------------------------------------------------------------------

  function show() {
    const { name, file, url } = pictures[at];
    URL.revokeObjectURL(fileUrl);
    fileUrl = file ? URL.createObjectURL(file) : "";
    heading.textContent = name;
    image.alt = name;
    failed.hidden = Boolean(file || url);
    select(false);
    status.textContent = pictures.length > 1 ? `Image ${at + 1} of ${pictures.length}` : "";
    if (fileUrl || url) image.src = fileUrl || url;
    else image.removeAttribute("src");
  }

  function end() {
    resized.disconnect();
    URL.revokeObjectURL(fileUrl);
  }

  function go(step) {
    at = (at + step + pictures.length) % pictures.length;
    show();
  }

  image.onload = () => {
    failed.hidden = true;
    buttons.region.disabled = false;
    fit();
  };
  image.onerror = () => {
    failed.hidden = false;
    buttons.region.disabled = true;
  };

  // --- the region --------------------------------------------------------------------------------------------------

  function select(on) {
    const { naturalWidth: width, naturalHeight: height } = image;
    region = on ? { x: width / 4, y: height / 4, width: width / 2, height: height / 2 } : null;
    frame.hidden = buttons.crop.hidden = !on;
    buttons.region.setAttribute("aria-pressed", String(on));
    buttons.region.textContent = on ? "Cancel the region" : "Select a region";
    stage.classList.toggle("selecting", on);
    if (!on) return;
    changed();
    frame.focus();
  }

  /** Keep the region within the picture, and show it. */
  function changed() {
    const { naturalWidth, naturalHeight } = image;
    const smallest = Math.min(MIN_REGION_PX, naturalWidth, naturalHeight);
    region.width = within(region.width, smallest, naturalWidth);
    region.height = within(region.height, smallest, naturalHeight);
    region.x = within(region.x, 0, naturalWidth - region.width);
    region.y = within(region.y, 0, naturalHeight - region.height);
    place();
    const size = `Region of ${Math.round(region.width)} × ${Math.round(region.height)} pixels. Drag to draw another one. `;
    status.replaceChildren(size, create("span", { className: "keys", textContent: "Arrow keys move it, Shift and arrow keys change its size, Enter classifies it." }));
  }

  async function crop() {
    const { name } = pictures[at];
    buttons.crop.disabled = true;
    try {
      const file = await cropped(image, region, `${name.replace(/\.[^.]*$/, "")} (region).jpg`);
      close();
      onCrop(file);
    } catch {
      status.textContent = "The browser could not cut out this region. Select a smaller one.";
      buttons.crop.disabled = false;
    }
  }

  // --- mouse, fingers and keys -------------------------------------------------------------------------------------

  const pointers = new Map(); // the place of each pressed pointer in the stage
  let drawnFrom = null; // where the drawing of a region began, in pixels of the picture

  const placeOf = (event) => {
    const box = stage.getBoundingClientRect();
    return { x: event.clientX - box.left - stage.clientLeft, y: event.clientY - box.top - stage.clientTop };
  };
  const inPicture = ({ x, y }) => ({ x: within((x - left) / zoom, 0, image.naturalWidth), y: within((y - top) / zoom, 0, image.naturalHeight) });

  stage.onpointerdown = (event) => {
    if (event.button) return;
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, placeOf(event));
    drawnFrom = region && pointers.size === 1 ? inPicture(placeOf(event)) : null;
    if (!stage.contains(document.activeElement)) stage.focus();
  };
  stage.onpointermove = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = placeOf(event);
    if (pointers.size === 2) pinch(event.pointerId, before, now);
    else if (drawnFrom) draw(inPicture(now));
    else moveBy(now.x - before.x, now.y - before.y);
    pointers.set(event.pointerId, now);
  };
  stage.onpointerup = stage.onpointercancel = (event) => {
    pointers.delete(event.pointerId);
    drawnFrom = null;
  };
  stage.ondblclick = (event) => {
    const { x, y } = placeOf(event);
    if (region) return;
    if (isFitted) zoomBy(2, x, y);
    else fit();
  };
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = placeOf(event);
    zoomBy(Math.exp(-event.deltaY / (event.deltaMode ? 15 : 400)), x, y);
  }, { passive: false });

  function pinch(id, before, now) {
    const [other] = [...pointers].filter(([entry]) => entry !== id).map(([, entry]) => entry);
    const factor = Math.hypot(now.x - other.x, now.y - other.y) / Math.max(1, Math.hypot(before.x - other.x, before.y - other.y));
    moveBy((now.x - before.x) / 2, (now.y - before.y) / 2);
    zoomBy(factor, (now.x + other.x) / 2, (now.y + other.y) / 2);
  }

  function draw(to) {
    region = { x: Math.min(drawnFrom.x, to.x), y: Math.min(drawnFrom.y, to.y), width: Math.abs(to.x - drawnFrom.x), height: Math.abs(to.y - drawnFrom.y) };
    changed();
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  dialog.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isDone = keyPressed(event);
    if (isDone) event.preventDefault();
  };

  function keyPressed({ key, shiftKey, target }) {
    if (key === "+" || key === "=") zoomBy(STEP);
    else if (key === "-") zoomBy(1 / STEP);
    else if (key === "0") fit();
    else if (key === "r" && onCrop && failed.hidden) select(!region);
    else if (key === "Enter" && region && target === frame) crop();
    else if (key === "Escape" && region) {
      select(false);
      buttons.region.focus();
    } else if (key in ARROWS) arrow(ARROWS[key], shiftKey);
    else return false;
    return true;
  }

  function arrow([x, y], withShift) {
    if (region) {
      const step = Math.max(1, Math.round(Math.min(image.naturalWidth, image.naturalHeight) / 50));
      region.x += withShift ? 0 : x * step;
      region.y += withShift ? 0 : y * step;
      region.width += withShift ? x * step : 0;
      region.height += withShift ? y * step : 0;
      changed();
    } else if (x && !withShift && pictures.length > 1) go(x);
    else moveBy(-x * MOVE_PX, -y * MOVE_PX);
  }

  const resized = new ResizeObserver(() => {
    if (!image.naturalWidth) return;
    if (isFitted) fit();
    else place();
  });
  resized.observe(stage);
  show();
  stage.focus();
}

function tool(text, name, onclick) {
  return create("button", { type: "button", className: "secondary icon", textContent: text, "aria-label": name, title: name, onclick });
}

const within = (value, least, most) => Math.min(most, Math.max(least, value));

/** Return a coordinate that leaves no gap at the edge; `room` is the space that is left, negative if the picture is larger. */
const kept = (value, room) => (room >= 0 ? room / 2 : within(value, room, 0));

/** Return a region of an image as a JPEG file. Browsers draw an image upright, as its EXIF data say. */
async function cropped(image, { x, y, width, height }, name) {
  const scale = Math.min(1, MAX_CROP_SIDE_PX / Math.max(width, height));
  const canvas = create("canvas", { width: Math.max(1, Math.round(scale * width)), height: Math.max(1, Math.round(scale * height)) });
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#fff"; // behind transparent pixels, as the server does it
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(image, x, y, width, height, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", JPEG_QUALITY));
  if (!blob) throw new Error("the canvas is too large");
  return new File([blob], name, { type: "image/jpeg" });
}
