// Sample images, drawn on a canvas, for trying the page without files.
import { create } from "./elements.js";

const WIDTH_PX = 320;
const HEIGHT_PX = 240;

const SAMPLES = {
  "red circle": (b) => { b.fillStyle = "#d12f2f"; b.beginPath(); b.arc(160, 120, 80, 0, 7); b.fill(); },
  "blue square": (b) => { b.fillStyle = "#2456c9"; b.fillRect(90, 50, 140, 140); },
  "green triangle": (b) => {
    b.fillStyle = "#2f9a4a";
    b.beginPath(); b.moveTo(160, 40); b.lineTo(250, 200); b.lineTo(70, 200); b.fill();
  },
  "yellow star": (b) => {
    b.fillStyle = "#e8b714";
    b.beginPath();
    for (let point = 0; point < 10; point += 1) {
      const angle = (point * Math.PI) / 5 - Math.PI / 2, radius = point % 2 ? 38 : 95;
      b.lineTo(160 + radius * Math.cos(angle), 125 + radius * Math.sin(angle));
    }
    b.fill();
  },
  "smiling face": (b) => {
    b.fillStyle = "#f4c430"; b.beginPath(); b.arc(160, 120, 90, 0, 7); b.fill();
    b.fillStyle = "#222"; b.beginPath(); b.arc(130, 95, 10, 0, 7); b.arc(190, 95, 10, 0, 7); b.fill();
    b.lineWidth = 8; b.strokeStyle = "#222"; b.beginPath(); b.arc(160, 120, 55, 0.3, Math.PI - 0.3); b.stroke();
  },
  "house": (b) => {
    b.fillStyle = "#c9875a"; b.fillRect(100, 110, 120, 90);
    b.fillStyle = "#8c3b2e"; b.beginPath(); b.moveTo(85, 110); b.lineTo(160, 45); b.lineTo(235, 110); b.fill();
    b.fillStyle = "#5b3a26"; b.fillRect(145, 150, 30, 50);
    b.fillStyle = "#bfe3f2"; b.fillRect(112, 125, 24, 24); b.fillRect(184, 125, 24, 24);
  },
  "tree": (b) => {
    b.fillStyle = "#7a5230"; b.fillRect(148, 140, 24, 70);
    b.fillStyle = "#3c8f4a";
    for (const [x, y] of [[160, 80], [120, 110], [200, 110], [160, 120]]) { b.beginPath(); b.arc(x, y, 48, 0, 7); b.fill(); }
  },
  "sailing boat": (b) => {
    b.fillStyle = "#9bd0ee"; b.fillRect(0, 0, 320, 240); b.fillStyle = "#2d6f9e"; b.fillRect(0, 170, 320, 70);
    b.fillStyle = "#7a4a2a"; b.beginPath(); b.moveTo(80, 165); b.lineTo(240, 165); b.lineTo(210, 200); b.lineTo(110, 200); b.fill();
    b.fillStyle = "#fff"; b.beginPath(); b.moveTo(160, 35); b.lineTo(160, 155); b.lineTo(235, 155); b.fill();
  },
  "night sky with moon": (b) => {
    b.fillStyle = "#0d1430"; b.fillRect(0, 0, 320, 240);
    b.fillStyle = "#f4f0d0"; b.beginPath(); b.arc(200, 80, 45, 0, 7); b.fill();
    for (let star = 0; star < 40; star += 1) b.fillRect((star * 73) % 320, (star * 47) % 240, 2, 2);
  },
  "flag with stripes": (b) => {
    for (const [row, colour] of ["#b22234", "#fff", "#b22234", "#fff", "#b22234"].entries()) {
      b.fillStyle = colour; b.fillRect(40, 50 + row * 28, 240, 28);
    }
  },
};

export const SAMPLE_NAMES = Object.keys(SAMPLES);

/** Draw every sample; returns files, like those of a file input. */
export function samplePictures() {
  return Object.entries(SAMPLES).map(([name, paint]) => draw(name, paint));
}

function draw(name, paint) {
  const canvas = create("canvas", { width: WIDTH_PX, height: HEIGHT_PX });
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#f2efe6";
  brush.fillRect(0, 0, WIDTH_PX, HEIGHT_PX);
  paint(brush);
  // Not with toBlob, which browsers delay on a busy machine.
  const bytes = Uint8Array.from(atob(canvas.toDataURL("image/png").split(",")[1]), (character) => character.charCodeAt(0));
  return new File([bytes], `${name}.png`, { type: "image/png" });
}
