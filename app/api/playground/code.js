// The current request as a curl command and as Python code.
import { hasKey } from "./requests.js";

// More files are left out: the code is an example to adapt.
const MAX_FILES = 3;

const shellLiteral = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const pythonLiteral = (value) => {
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  return value === true ? "True" : JSON.stringify(value);
};

const serviceUrl = () => new URL(".", document.baseURI).href;

/** Return the value of a field as text in a form. */
export const formValue = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** Return the curl command that classifies files of these names with these fields, [[name, value], ...]. */
export function curlCode(names, fields) {
  return [
    "curl",
    ...(hasKey() ? ['-H "Authorization: Bearer $DEIXIS_API_KEY"'] : []),
    ...names.slice(0, MAX_FILES).map((name) => `-F image=@${shellLiteral(name)}`),
    ...fields.map(([name, value]) => `${/^[@<]/.test(formValue(value)) ? "--form-string" : "-F"} ${shellLiteral(`${name}=${formValue(value)}`)}`),
    `${serviceUrl()}v1/classify`,
  ].join(" \\\n  ");
}

/** Return the Python code that does the same. */
export function pythonCode(names, fields) {
  return [
    `import deixis  # in a clone of Deixis: pip install .${hasKey() ? "; reads the key from DEIXIS_API_KEY" : ""}`,
    "",
    `with deixis.Client(${JSON.stringify(serviceUrl())}) as client:`,
    "    response = client.classify(",
    ...names.slice(0, MAX_FILES).map((name) => `        ${JSON.stringify(name)},`),
    ...fields.map(([name, value]) => `        ${name}=${pythonLiteral(value)},`),
    "    )",
    "for result in response.results:",
    `    print(result.error or result.${fields.some(([name]) => name === "multi_label") ? "labels" : "predictions[0]"})`,
  ].join("\n");
}
