// Where memory is: the plan against now, and how far each head looks back.

import { bytes, count, duration, find, make } from "./dom.js";

let planned = null; // the plan that is drawn, as JSON

/** Show what /status told. */
export function show(status) {
  const { model, context, queue, last, memory, documents } = status;
  find("model-line").textContent = `${model.name}: ${model.weights} weights, ${model.pages} pages, on ${model.device}`;
  find("state").textContent = queue.waiting ? `busy, ${count(queue.waiting)} waiting` : queue.running ? "busy" : "idle";
  const onGpu = model.device !== "cpu";
  find("now").replaceChildren(...[
    gauge("Context", context.tokens, context.capacity, `${count(context.tokens)} of ${count(context.capacity)} tokens`),
    gauge("Cache", memory.cache.filled, memory.cache.planned, `${bytes(memory.cache.filled)} of ${bytes(memory.cache.planned)} filled`
      + (memory.cache.on_host ? `, ${bytes(memory.cache.on_host)} of it in host memory` : "")),
    place(onGpu ? "GPU memory, all programs" : "Main memory", memory.device),
    memory.host.planned || onGpu ? place("Host memory", memory.host) : null,
    memory.hot_pool && line("Hot pool", `${bytes(memory.hot_pool.planned)} of GPU memory; ${hits(memory.hot_pool)}`),
    documents && gauge("Documents on disk", documents.bytes, documents.bytes + documents.free,
      `${bytes(documents.bytes)}, ${bytes(documents.free)} free`),
    line("Last reading", paceOf(last.reading)),
    line("Last answer", paceOf(last.writing)),
    documents && line("Last document loaded", paceOf(last.loading)),
    line("Model", model.shape),
    line("Formats", `${model.weights} weights, ${model.pages} pages of ${model.page_size} tokens`),
  ].filter(Boolean));
  const plan = JSON.stringify([memory.items, status.heads]);
  if (plan === planned) return;
  planned = plan;
  drawPlan(memory);
  drawHeads(status.heads, context.capacity);
}

const place = (title, { in_use, planned, allowed }) =>
  gauge(title, in_use, Math.max(allowed, in_use), `${bytes(in_use)} now, ${bytes(planned)} planned, ${bytes(allowed)} allowed`, planned);

/** A line of words with a bar under it: `used` is filled, `planned` is hatched. */
function gauge(title, used, most, words, planned = 0) {
  return make("div", { className: "gauge" }, make("span", {}, title), make("span", {}, words), bar([planned, "planned"], [used, "used"], most));
}

function bar(...sizes) {
  const most = sizes.pop();
  const parts = sizes.map(([size, className]) => {
    const part = make("span", { className });
    part.style.width = `${Math.min(100, (100 * size) / Math.max(most, 1))}%`;
    return part;
  });
  return make("div", { className: "track", ariaHidden: "true" }, ...parts);
}

const line = (title, words) => make("div", { className: "gauge" }, make("span", {}, title), make("span", {}, words));

const paceOf = (rate) => (rate ? `${count(rate.tokens)} tokens in ${duration(rate.seconds)}: ${speed(rate.tokens_per_s)}` : "none yet");

const hits = ({ host_pages_chosen: chosen, hit_rate: rate }) =>
  (chosen ? `${(100 * rate).toFixed(1)}% of ${count(chosen)} chosen host pages stood there` : "no host page chosen yet");

const speed = (rate) => `${rate < 10 ? rate.toFixed(1) : count(Math.round(rate))} tokens/s`;

const row = (kind, ...cells) => make("tr", {}, ...cells.map((each, number) => {
  const cell = make(number === 0 || kind === "head" ? "th" : "td", {}, each);
  if (cell.tagName === "TH") cell.scope = kind === "head" ? "col" : "row";
  return cell;
}));

function drawPlan({ items, device, host }) {
  const whole = device.planned + host.planned;
  find("plan-table").replaceChildren(
    row("head", "part", "where", "bytes", ""),
    ...items.map((item) => row("body", make("span", { title: item.note }, item.name), item.place, bytes(item.bytes),
      bar([item.bytes, "used"], whole))),
    row("body", "together", "", bytes(whole), ""),
  );
}

/** A row a layer, a column a KV head: words in every cell, and a bar that is as long as the head's reach. */
function drawHeads({ summary, note, sink_size, recent_size, reaches }, capacity) {
  const window = sink_size + recent_size;
  const legend = `A number is how many of the newest tokens a head sees beside the first ${count(sink_size)}; "stream" is the last ${count(recent_size)}.`;
  const few = reaches.some((each) => each.some((reach) => reach !== "all"));
  find("heads-line").textContent = `${summary} (${note}).${few ? ` ${legend}` : ""}`;
  const cell = (reach) => {
    const tokens = reach === "all" ? capacity : reach === "streaming" ? window : Math.min(reach, capacity);
    const shown = reach === "all" ? "all" : reach === "streaming" ? "stream" : short(reach);
    return make("div", { className: "head-cell" }, shown, bar([tokens, reach === "all" ? "used" : "planned"], capacity));
  };
  find("head-map").replaceChildren(
    row("head", "layer", ...reaches[0].map((_, head) => `h${head}`)),
    ...reaches.map((each, layer) => row("body", String(layer), ...each.map(cell))),
  );
}

const short = (tokens) => (tokens >= 10000 ? `${Math.round(tokens / 1000)}K` : count(tokens));
