// An answer's text as paragraphs and fenced code, which is all of Markdown that is rendered. Text stays text.

import { make } from "./dom.js";

/** [[kind, text]] with kind "text" or "code"; a fence that is still open holds the rest. */
export function parts(text) {
  const found = [["text", ""]];
  let fence = null;
  for (const line of text.split(/(?<=\n)/)) {
    const mark = line.match(/^ {0,3}(`{3,}|~{3,})(.*)/);
    if (fence === null && mark && !mark[2].includes("`")) {
      fence = mark[1];
      found.push(["code", ""]);
    } else if (fence !== null && mark && mark[1].startsWith(fence) && !mark[2].trim()) {
      fence = null;
      found.push(["text", ""]);
    } else {
      found.at(-1)[1] += line;
    }
  }
  return found.filter(([kind, each]) => kind === "code" || each.trim());
}

/** Show the text in `body`, changing only what has changed, so that a selection in a growing answer stays. */
export function show(body, text) {
  const wanted = parts(text);
  wanted.forEach(([kind, each], number) => {
    const shown = each.replace(/^\n+|\n+$/g, "");
    let element = body.children[number];
    if (element?.className !== kind) {
      const fresh = kind === "code" ? make("pre", { className: kind, tabIndex: 0 }) : make("div", { className: kind });
      element ? element.replaceWith(fresh) : body.append(fresh);
      element = fresh;
    }
    if (element.textContent !== shown) element.textContent = shown;
  });
  while (body.children.length > wanted.length) body.lastChild.remove();
}
