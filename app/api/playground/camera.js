// Pictures from a camera of the computer.
import { countText, create, option, refocus } from "./elements.js";
import { openModal } from "./modal.js";

const JPEG_QUALITY = 0.95;

const PROBLEMS = {
  NotAllowedError: "The browser does not allow this page to use the camera. Allow it at the address bar of the browser, then try again.",
  NotFoundError: "No camera was found. Connect one, then try again.",
  NotReadableError: "The camera cannot be used. Another program may be using it; close that program, then try again.",
};

/**
 * Take pictures with a camera in a dialog; `onPictures` receives them as an array of files when the dialog is confirmed.
 *
 * The camera is off when the dialog is closed.
 */
export function openCamera({ onPictures }) {
  const video = create("video", { autoplay: true, playsInline: true, muted: true, "aria-label": "Camera image" });
  const problem = create("p", { className: "problem", role: "alert", hidden: true });
  const status = create("p", { className: "hint", role: "status" });
  const shoot = create("button", { type: "button", textContent: "Take an image", disabled: true, onclick: take });
  const use = create("button", { type: "button", onclick: confirm });
  const again = create("button", { type: "button", className: "secondary", textContent: "Try again", hidden: true, onclick: () => start() });
  const choice = create("select", { "aria-label": "Camera", hidden: true, onchange: () => start(choice.value) });
  const list = create("ul", { className: "pictures", "aria-label": "Images taken" });
  const { close } = openModal(
    "Take images", { className: "camera", closed: end }, video, problem, list, status, create("p", { className: "actions" }, shoot, again, use, choice),
  );
  let stream = null, isClosed = false;
  let taken = []; // {file, url}
  let shots = 0;
  let starts = 0;

  async function start(deviceId) {
    stop();
    starts += 1;
    const current = starts;
    problem.hidden = again.hidden = true;
    video.hidden = false;
    // Only pages of https and of localhost have this property.
    if (!navigator.mediaDevices?.getUserMedia) {
      show("Browsers give the camera only to pages that are opened over HTTPS or from localhost. Open this page at such an address.");
      return;
    }
    status.textContent = "Waiting for the camera…";
    try {
      const which = deviceId ? { deviceId: { exact: deviceId } } : { facingMode: { ideal: "environment" } };
      const opened = await navigator.mediaDevices.getUserMedia({ video: { ...which, width: { ideal: 1920 }, height: { ideal: 1080 } } });
      if (isClosed || current !== starts) { // another camera was chosen meanwhile
        for (const track of opened.getTracks()) track.stop();
        return;
      }
      stream = opened;
      video.srcObject = stream;
      await video.play();
      status.textContent = "";
      shoot.disabled = false;
      shoot.focus();
      await showChoice();
    } catch (error) {
      if (isClosed || current !== starts) return;
      show(PROBLEMS[error.name] ?? `The camera cannot be used: ${error.message}`);
    }
  }

  function show(text) {
    stop();
    status.textContent = "";
    video.hidden = true;
    problem.textContent = text;
    problem.hidden = again.hidden = false;
  }

  /** Offer the other cameras; browsers name them only after access was allowed. */
  async function showChoice() {
    const cameras = (await navigator.mediaDevices.enumerateDevices()).filter((device) => device.kind === "videoinput");
    choice.replaceChildren(...cameras.map((device, index) => option(device.deviceId, device.label || `Camera ${index + 1}`)));
    choice.value = stream?.getVideoTracks()[0].getSettings().deviceId ?? "";
    choice.hidden = cameras.length < 2;
  }

  async function take() {
    const canvas = create("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    shoot.disabled = true;
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", JPEG_QUALITY));
    shoot.disabled = !stream;
    if (isClosed || !blob) return;
    shots += 1;
    const file = new File([blob], `camera ${timeName()} ${shots}.jpg`, { type: "image/jpeg" });
    taken.push({ file, url: URL.createObjectURL(blob) });
    showTaken();
    shoot.focus();
  }

  function showTaken() {
    list.replaceChildren(...taken.map(({ file, url }, index) => {
      const remove = create("button", { type: "button", className: "remove", textContent: "×", "aria-label": `Remove ${file.name}` });
      remove.onclick = () => {
        URL.revokeObjectURL(url);
        taken.splice(index, 1);
        showTaken();
        refocus(list, index, shoot);
      };
      return create("li", {}, create("img", { src: url, alt: file.name }), remove);
    }));
    use.hidden = !taken.length;
    shoot.classList.toggle("secondary", taken.length > 0);
    use.textContent = taken.length === 1 ? "Use this image" : `Use ${countText(taken.length, "image")}`;
  }

  function confirm() {
    const files = taken.map((entry) => entry.file);
    close();
    onPictures(files);
  }

  function stop() {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    video.srcObject = null;
    shoot.disabled = true;
  }

  function end() {
    isClosed = true;
    stop();
    for (const { url } of taken) URL.revokeObjectURL(url);
    taken = [];
  }

  showTaken();
  start();
}

const timeName = () => new Date().toLocaleTimeString("sv").replaceAll(":", ".");
