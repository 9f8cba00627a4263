// Documents of the server: adding, reading's progress, deleting.

import { bytes, count, duration, find, make, say, sure } from "./dom.js";
import { call, callJson } from "./server.js";

const KINDS = {
  pdf: "application/pdf", html: "text/html", htm: "text/html", md: "text/markdown",
  zip: "application/zip", tar: "application/x-tar", gz: "application/gzip", tgz: "application/gzip",
};
const WINDOW = 30; // seconds over which the speed of reading is taken
const STATES = { queued: "waiting", reading: "reading", ready: "✓ ready", failed: "✗ failed" };

const shown = new Map(); // name -> { item, past: [[seconds, tokens done]] }
let changed = () => {};
let mostBytes = Infinity; // of one document

/** `onAsk(name)` when a person wants to ask about one, `onChange()` when the list is out of date. */
export function begin(onAsk, onChange) {
  changed = onChange;
  const drop = find("drop");
  find("files").addEventListener("change", (event) => {
    add([...event.target.files]);
    event.target.value = "";
  });
  for (const [kind, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
    });
  }
  drop.addEventListener("drop", (event) => add([...event.dataTransfer.files]));
  find("document-list").addEventListener("click", ({ target }) => {
    const name = target.closest("li")?.dataset.name;
    if (target.matches(".ask")) onAsk(name);
    if (target.matches(".delete")) remove(name);
  });
}

/** Fetch and show the list; true while any of them is being read. No document may have more than `most` bytes. */
export async function refresh(most) {
  mostBytes = most;
  const { data } = await callJson("/documents");
  for (const [name, { item }] of shown) {
    if (data.some((each) => each.name === name)) continue;
    item.remove();
    shown.delete(name);
  }
  for (const told of data) draw(told);
  return data.some(({ state }) => state === "queued" || state === "reading");
}

async function add(files) {
  say(find("document-problem"), null);
  for (const file of files) {
    const name = file.name.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^\.+/, "").slice(-100) || "document";
    if (shown.has(name) && !(await sure(`There is a document ${name} already. Put this file in its place?`, "Replace"))) continue;
    if (file.size > mostBytes) {
      say(find("document-problem"), `${file.name} has ${bytes(file.size)}, more than the ${bytes(mostBytes)} that this server takes.`);
      continue;
    }
    const kind = KINDS[name.split(".").pop().toLowerCase()] ?? "text/plain";
    say(find("sending"), `Sending ${file.name}`);
    await tried(() => call(`/documents/${name}`, { method: "PUT", headers: { "Content-Type": kind }, body: file }), `${file.name}: `);
    changed();
  }
  say(find("sending"), null);
}

async function remove(name) {
  if (!(await sure(`Delete ${name} and what was read of it from the server?`, "Delete"))) return;
  await tried(() => call(`/documents/${name}`, { method: "DELETE" }));
  changed();
  find("files").focus();
}

async function tried(work, before = "") {
  try {
    await work();
  } catch (error) {
    say(find("document-problem"), before + error.message);
  }
}

function draw(told) {
  if (!shown.has(told.name)) shown.set(told.name, added(told.name));
  const { item, past } = shown.get(told.name);
  const part = (name) => item.querySelector(`.${name}`);
  const unread = told.state === "queued" || told.state === "reading";
  part("state").textContent = STATES[told.state];
  const sparse = told.reading.sparse_tokens;
  const how = sparse ? `, ${count(sparse)} of them read sparsely` : "";
  part("size").textContent = `${count(told.tokens)} tokens${how}, ${bytes(told.bytes)}`;
  part("reading").hidden = !unread;
  Object.assign(part("bar"), { max: Math.max(told.tokens, 1), value: told.tokens_done });
  part("eta").textContent = `${count(told.tokens_done)} of ${count(told.tokens)} tokens${eta(past, told)}`;
  say(part("problem"), told.error);
  say(part("notices"), told.notices.join(" "));
  part("ask").disabled = told.state !== "ready";
}

function added(name) {
  const item = make("li", {},
    make("div", { className: "row" }, make("b", {}, name), make("span", { className: "state" })),
    make("p", { className: "size quiet" }),
    make("div", { className: "reading" }, make("progress", { className: "bar", ariaLabel: `Reading ${name}` }), make("span", { className: "eta" })),
    make("p", { className: "problem", hidden: true }),
    make("p", { className: "notices quiet", hidden: true }),
    make("div", { className: "row" },
      make("button", { type: "button", className: "ask", ariaLabel: `Ask about ${name}` }, "Ask"),
      make("button", { type: "button", className: "delete", ariaLabel: `Delete ${name}` }, "Delete")),
  );
  item.dataset.name = name;
  const after = [...find("document-list").children].find((each) => each.dataset.name > name);
  find("document-list").insertBefore(item, after ?? null);
  return { item, past: [] };
}

/** How long reading takes still, by its speed in the last seconds. */
function eta(past, { tokens, tokens_done: done }) {
  const now = performance.now() / 1000;
  if (past.length && done < past.at(-1)[1]) past.length = 0; // it was replaced
  if (done !== past.at(-1)?.[1]) past.push([now, done]);
  while (past.length > 2 && past[0][0] < now - WINDOW) past.shift();
  const [[begun, before], [end, after]] = [past[0], past.at(-1)];
  return after > before ? `, about ${duration(((tokens - done) * (end - begun)) / (after - before))} left` : "";
}
