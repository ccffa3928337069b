// The current request as a curl command and as Python code.
import { byId } from "./elements.js";
import { hasKey } from "./requests.js";

const shellLiteral = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const pythonLiteral = (value) => {
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  return value === true ? "True" : JSON.stringify(value);
};

/** Return the value of a field as text in a form. */
export const formValue = (value) => (typeof value === "string" ? value : JSON.stringify(value));

/** Show the code that classifies files of these names with these fields, [[name, value], ...]. */
export function showCode(names, fields) {
  const url = new URL(".", document.baseURI).href;
  byId("curl").textContent = [
    "curl",
    ...(hasKey() ? ['-H "Authorization: Bearer $DEIXIS_API_KEY"'] : []),
    ...names.map((name) => `-F image=@${shellLiteral(name)}`),
    ...fields.map(([name, value]) => `-F ${shellLiteral(`${name}=${formValue(value)}`)}`),
    `${url}v1/classify`,
  ].join(" \\\n  ");
  byId("python").textContent = [
    `import deixis  # in a clone of Deixis: pip install .${hasKey() ? "; reads the key from DEIXIS_API_KEY" : ""}`,
    "",
    `with deixis.Client(${JSON.stringify(url)}) as client:`,
    "    response = client.classify(",
    ...names.map((name) => `        ${JSON.stringify(name)},`),
    ...fields.map(([name, value]) => `        ${name}=${pythonLiteral(value)},`),
    "    )",
    "for result in response.results:",
    "    print(result.error or result.predictions[0])",
  ].join("\n");
}

/** Register the event handlers of the copy buttons. */
export function startCopying() {
  for (const button of document.querySelectorAll(".copy")) {
    button.onclick = async () => {
      const code = byId(button.dataset.of);
      if (navigator.clipboard) {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
        setTimeout(() => { button.textContent = "copy"; }, 1500);
      } else {
        getSelection().selectAllChildren(code); // the clipboard needs HTTPS; select the code so that Ctrl+C copies it
      }
    };
  }
}
