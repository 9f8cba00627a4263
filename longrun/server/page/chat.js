// The conversation: asking, streaming, stopping. It is kept in this tab, and survives a reload.

import { count, duration, find, make, say } from "./dom.js";
import { show } from "./markdown.js";
import { chips } from "./passages.js";
import { call, events } from "./server.js";

const STORE = "longrun conversation";
const nothing = find("nothing-yet");
const ENDS = { length: "ended at its most tokens", stopped: "stopped", broken: "broke off" };

let turns = []; // { role, content, model, end, usage, passages }: the last four of answers only
let running = null; // AbortController of the answer that is being written

let ended = () => {};

/** `onEnd()` after every answer. */
export function begin(onEnd) {
  ended = onEnd;
  const field = find("question");
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(field.value.trim(), find("model").value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("ask").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
  });
  find("stop").addEventListener("click", () => running?.abort());
  find("new-chat").addEventListener("click", () => {
    running?.abort();
    turns = [];
    keep();
    draw();
    field.focus();
  });
  turns = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
  draw();
}

/** Offer these models; the one that is chosen stays, where it is still there. */
export function offer(ids) {
  const select = find("model");
  const chosen = select.value;
  if (ids.join() === [...select.options].map((option) => option.value).join()) return;
  select.replaceChildren(...ids.map((id) => make("option", { value: id }, id.replace(/^.*?@/, "about "))));
  if (ids.includes(chosen)) select.value = chosen;
  else if (chosen) say(find("problem"), `${chosen} is no longer served: the next question goes to ${select.value}.`);
}

/** Ask about this model from now on. */
export function choose(id) {
  find("model").value = id;
  find("question").focus();
}

async function ask(question, model) {
  if (!question || running) return;
  const mine = turns;
  const answer = { role: "assistant", content: "", model };
  turns.push({ role: "user", content: question }, answer);
  say(find("problem"), null);
  find("question").value = "";
  const view = draw();
  busy(new AbortController());
  try {
    await write(answer, view, running.signal);
  } catch (error) {
    answer.end = error.name === "AbortError" ? "stopped" : "broken";
    const advice = error.field === "looked_at" ? " Settings can turn off what an answer looked at." : "";
    if (answer.end === "broken") say(find("problem"), error.message + advice);
  }
  busy(null);
  ended();
  if (mine !== turns) return; // a new chat was begun meanwhile
  if (answer.end in { stopped: 1, broken: 1 } && !answer.content) {
    turns.splice(-2); // nothing came: the question goes back to where it was written
    find("question").value ||= question;
  }
  keep();
  draw();
}

async function write(answer, view, signal) {
  const most = find("max-tokens").valueAsNumber;
  const body = {
    model: answer.model,
    messages: turns.slice(0, -1).map(({ role, content }) => ({ role, content })),
    temperature: find("temperature").valueAsNumber || 0,
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    ...(most && { max_tokens: most }),
    ...(find("passages").checked && { looked_at: true }),
  };
  tell("Waiting for the server");
  const headers = { "Content-Type": "application/json" };
  const response = await call("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const chunk of events(response)) {
    const [choice] = chunk.choices;
    if (chunk.prompt_progress) reading(chunk.prompt_progress);
    if (chunk.usage) answer.usage = chunk.usage;
    if (chunk.looked_at) answer.passages = chunk.looked_at;
    if (choice?.finish_reason) answer.end = choice.finish_reason;
    if (choice?.delta.content) {
      if (!answer.content) tell("Writing");
      answer.content += choice.delta.content;
      follow(() => show(view, answer.content));
    }
  }
}

/** Draw every turn; returns where the text of the last one goes. */
function draw() {
  const log = find("log");
  let last = null;
  const shown = turns.map((turn, number) => {
    const body = make("div", { className: "body" });
    if (turn.role === "assistant") show((last = body), turn.content);
    else body.append(make("div", { className: "text long", ...(turn.content.length > 600 && { tabIndex: 0 }) }, turn.content));
    const who = turn.role === "user" ? "You" : turn.model;
    return make("article", { className: `turn ${turn.role}`, ariaLabel: who }, make("h3", {}, who), body, foot(turn, number));
  });
  follow(() => log.replaceChildren(...(shown.length ? shown : [nothing])), true);
  return last;
}

/** Under an answer that has ended: what it looked at, how it ended, what was read. */
function foot(turn, number) {
  if (!turn.end) return null;
  const used = turn.usage && [
    `${count(turn.usage.prompt_tokens)} tokens before it`,
    `${count(turn.usage.prompt_tokens_details.cached_tokens)} of them held already`,
    `${count(turn.usage.completion_tokens)} written`,
  ];
  const told = [ENDS[turn.end], ...(used ?? [])].filter(Boolean).join(", ");
  return make("footer", {},
    turn.passages ? chips(turn.passages, turns.slice(0, number)) : null,
    told ? make("p", { className: "quiet" }, told) : null,
  );
}

function busy(controller) {
  running = controller;
  find("send").disabled = running !== null;
  find("stop").disabled = running === null;
  find("log").ariaBusy = String(running !== null); // a screen reader hears the answer when it is whole
  find("progress").hidden = running === null;
}

function tell(text, done = null, total = 1) {
  const bar = find("progress-bar");
  find("progress-text").textContent = text;
  bar.hidden = done === null;
  [bar.max, bar.value] = [total, done ?? 0];
}

function reading({ total, cache, processed, time_ms }) {
  const left = ((total - processed) * time_ms) / 1000 / (processed - cache);
  const eta = left > 1 && Number.isFinite(left) ? `, about ${duration(left)} left` : "";
  tell(`Reading: ${count(processed)} of ${count(total)} tokens${eta}`, processed, total);
}

/** Make a change to the log and stay at its end, where the person was there or `always`. */
function follow(change, always = false) {
  const log = find("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (always || atEnd) log.scrollTop = log.scrollHeight;
}

function keep() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(turns));
  } catch {
    sessionStorage.removeItem(STORE); // rather nothing than an older one
    say(find("problem"), "This conversation is too long to be kept: it will be gone when the page is loaded again.");
  }
}
