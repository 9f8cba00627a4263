// Requests to the server, with the key where it asks for one, and its errors in words.

import { find } from "./dom.js";

const KEY = "longrun key";
let asking = null; // the dialog's promise while it is open

/** What the server refused or broke off with; `field` is the one of the request that it refused. */
export class ServerError extends Error {
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

/** The response to a request that went well. Throws ServerError, or AbortError where the signal stopped it. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it still running?");
    });
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (sessionStorage.getItem(KEY) === key) await (asking ??= newKey(key !== null));
  }
}

export const callJson = async (path, options) => (await call(path, options)).json();

/** The data of each server-sent event, as JSON, up to [DONE]. Throws ServerError where the stream ends before. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The connection broke off before the answer was finished.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(sentence(event.error.message), event.error.param);
      yield event;
    }
  }
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({ error: { message: `the server answered ${response.status}` } }));
  return new ServerError(sentence(error.message), error.param);
}

function sentence(text) {
  const line = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.?!]$/.test(line) ? line : `${line}.`;
}

/** Ask for a key until one is given; whether the server takes it shows the next request. */
function newKey(refused) {
  const dialog = find("key");
  find("key-wrong").hidden = !refused;
  find("key-input").value = "";
  return new Promise((resolve) => {
    dialog.addEventListener("close", function closed() {
      const given = find("key-input").value;
      if (!given) return dialog.showModal(); // Escape: nothing works without one
      sessionStorage.setItem(KEY, given);
      dialog.removeEventListener("close", closed);
      asking = null;
      resolve();
    });
    dialog.showModal();
  });
}
