// What an answer looked at: chips under it, and the text opened at one of them.

import { count, find, make, percent } from "./dom.js";
import { call } from "./server.js";

const AROUND = 200; // lines shown before and after a passage, until more are asked for

let open = null; // { passages, number, messages } of the reader

export function begin() {
  find("reader-close").addEventListener("click", () => find("reader").close());
  find("reader-before").addEventListener("click", () => turn(-1));
  find("reader-after").addEventListener("click", () => turn(1));
}

/** A list of buttons, one a passage; `messages` are those that the answer answered. */
export function chips(passages, messages) {
  if (!passages.length) return make("p", { className: "quiet" }, "It looked at nothing before the question.");
  const shown = passages.map((passage, number) => {
    const button = make("button", { type: "button", className: "chip", title: passage.text.slice(0, 300) });
    button.append(make("b", {}, nameOf(passage)), ` ${linesOf(passage)}`, make("span", {}, ` ${percent(passage.share)}`));
    button.addEventListener("click", () => openAt({ passages, number, messages }));
    return make("li", {}, button);
  });
  const title = "Where attention went while it was written: a hint, no proof";
  return make("div", { className: "looked" }, make("span", { title }, "Looked at"), make("ul", { title }, ...shown));
}

const nameOf = ({ document, file, message }) => file ?? document ?? (message === null ? "the text" : `message ${message + 1}`);

function linesOf({ lines }) {
  if (!lines) return "";
  return lines[0] === lines[1] ? `line ${count(lines[0])}` : `lines ${count(lines[0])}–${count(lines[1])}`;
}

function turn(by) {
  openAt({ ...open, number: open.number + by });
}

async function openAt(place) {
  open = place;
  const { passages, number, messages } = place;
  const passage = passages[number];
  const reader = find("reader");
  const body = find("reader-text");
  find("reader-title").textContent = [nameOf(passage), linesOf(passage)].filter(Boolean).join(", ");
  find("reader-place").textContent = `Passage ${number + 1} of ${passages.length}, ${percent(passage.share)} of what it looked at`;
  find("reader-before").disabled = number === 0;
  find("reader-after").disabled = number === passages.length - 1;
  body.replaceChildren(make("p", { className: "quiet" }, "Loading the text"));
  if (!reader.open) reader.showModal();
  const shown = await textAt(passage, messages).then((text) => marked(text, passage), (error) => only(passage, error.message));
  if (open !== place) return; // another one was chosen meanwhile
  body.replaceChildren(...shown);
  body.querySelector("mark").scrollIntoView({ block: "center" });
}

/** [before, the passage, after] of the text that it stands in. */
async function textAt({ document, file, message, bytes }, messages) {
  if (!bytes) throw new Error("Its place in the text is not known.");
  const whole = document === null ? messages[message].content : await (await call(`/documents/${document}/text`)).text();
  const raw = new TextEncoder().encode(file === null ? whole : fileIn(whole, file));
  const decode = (first, stop) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(raw.subarray(first, stop));
  return [decode(0, bytes[0]), decode(...bytes), decode(bytes[1], raw.length)];
}

/** One file of a text that holds several, each below a line with its name, in which lines and bytes are counted. */
function fileIn(whole, file) {
  const header = `==> ${file} <==\n`;
  const at = whole.startsWith(header) ? 0 : whole.indexOf(`\n\n${header}`) + 2;
  if (at === 1) throw new Error(`${file} is no longer in this document.`);
  const rest = whole.slice(at + header.length);
  const next = rest.search(/\n\n==> .+ <==\n/);
  return next < 0 ? rest : rest.slice(0, next);
}

function only({ text, share }, why) {
  return [make("p", { className: "problem" }, why), label(share), make("div", { className: "line" }, make("mark", {}, text))];
}

const inOneLine = (text) => text.split(/\s+/).filter(Boolean).join(" ");

/** The lines around the passage, which is marked and labelled, with numbers. */
function marked([before, passage, after], { share, text }) {
  if (!text.includes(inOneLine(passage).slice(0, 200))) return only({ text, share }, "The text has changed since this answer was written.");
  const [above, inside, below] = [before, passage, after].map((each) => each.split("\n"));
  const first = above.length; // the number of the passage's first line
  const lead = above.pop();
  const tail = below.shift();
  const lines = inside.map((each, number) => line(first + number,
    number === 0 ? lead : "", make("mark", {}, each || " "), number === inside.length - 1 ? tail : ""));
  const last = first + inside.length;
  return [
    ...lessOf(above.map((each, number) => [number + 1, each]), -AROUND, "Show all that stands before"),
    label(share),
    ...lines,
    ...lessOf(below.map((each, number) => [last + number, each]), AROUND, "Show all that follows"),
  ];
}

/** The |most| lines at the beginning (or, below 0, at the end), and a button for the others. */
function lessOf(numbered, most, title) {
  const lines = (some) => some.map(([number, each]) => line(number, each));
  if (numbered.length <= Math.abs(most)) return lines(numbered);
  const [others, shown] = most < 0 ? [numbered.slice(0, most), numbered.slice(most)] : [numbered.slice(most), numbered.slice(0, most)];
  const more = make("button", { type: "button" }, `${title}: ${count(others.length)} lines`);
  more.addEventListener("click", () => more.replaceWith(...lines(others)));
  return most < 0 ? [more, ...lines(shown)] : [...lines(shown), more];
}

function line(number, ...text) {
  const shown = make("div", { className: "line" }, ...text);
  shown.dataset.number = number;
  return shown;
}

const label = (share) => make("p", { className: "label" }, `Looked at: ${percent(share)}`);
