// Elements, and numbers as people read them. Strings become text nodes here, never markup.

export const find = (id) => document.getElementById(id);

/** An element with these properties and children; a null child is left out. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Show `text` in a paragraph that is hidden without one. */
export function say(paragraph, text) {
  paragraph.textContent = text ?? "";
  paragraph.hidden = !text;
}

export const count = (number) => number.toLocaleString("en");
export const percent = (share) => `${Math.round(100 * share)}%`;

/** Three digits in decimal units: 59136000000 is "59.1 GB". */
export function bytes(number) {
  const [size, unit] = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "KB"]].find(([size]) => number >= size) ?? [1, "B"];
  const scaled = number / size;
  return `${size === 1 ? number : scaled.toFixed(scaled < 10 ? 2 : scaled < 100 ? 1 : 0)} ${unit}`;
}

export function duration(seconds) {
  if (seconds < 100) return `${seconds < 9.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Whether the person agrees; `yes` names what is done then. */
export function sure(question, yes) {
  const dialog = find("sure");
  find("sure-text").textContent = question;
  find("sure-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
