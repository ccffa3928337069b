// Six photographs to try the page with; samples/README.md says where they are from.
import { blobOf, fetchOrThrow } from "./requests.js";

export const SAMPLES = [
  { name: "cat.jpg", subject: "a cat" },
  { name: "coffee.jpg", subject: "a cup of coffee" },
  { name: "astronaut.jpg", subject: "an astronaut" },
  { name: "rocket.jpg", subject: "a rocket at its launch" },
  { name: "galaxies.jpg", subject: "galaxies" },
  { name: "photographer.jpg", subject: "a photographer" },
];

export const SAMPLE_LABELS = ["cat", "cup of coffee", "astronaut", "rocket launch", "outer space", "camera on a tripod"];

export const sampleUrl = (name) => `playground/samples/${name}`;

/** Return a sample as a file, like one of a file input. */
export async function sampleFile(name) {
  return new File([await blobOf(await fetchOrThrow(sampleUrl(name)))], name, { type: "image/jpeg" });
}
