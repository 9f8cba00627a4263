// The page: its parts, and the questions about state that it keeps asking the server.

import * as chat from "./chat.js";
import * as documents from "./documents.js";
import { find } from "./dom.js";
import * as memory from "./memory.js";
import * as passages from "./passages.js";
import { callJson } from "./server.js";

const BUSY = 1000; // milliseconds between two looks at the server while it works
const IDLE = 4000;

let timer = null;
let models = []; // the ids that are served

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll("nav button")) {
    button.ariaCurrent = button.dataset.view === name ? "true" : null;
  }
}

/** Ask the server how it is, and come back for more; a hidden page asks nothing. */
async function look() {
  clearTimeout(timer);
  let busy = false;
  try {
    const status = await callJson("/status");
    memory.show(status);
    find("with-documents").hidden = !status.documents;
    find("no-documents").hidden = Boolean(status.documents);
    busy = status.queue.running > 0;
    if (status.documents) busy = (await documents.refresh(status.body_bytes)) || busy;
    models = (await callJson("/v1/models")).data.map(({ id }) => id);
    chat.offer(models);
  } catch (error) {
    find("state").textContent = error.message;
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(look, busy ? BUSY : IDLE);
}

chat.begin(look);
passages.begin();
documents.begin(async (name) => {
  const served = () => models.find((id) => id.endsWith(`@${name}`));
  if (!served()) await look();
  view("chat");
  if (served()) chat.choose(served());
}, look);
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => view(button.dataset.view));
}
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
