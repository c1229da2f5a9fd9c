// Markdown as DOM nodes. Text only ever becomes the text of a node, so nothing in it can be markup.

const FENCE = /^ {0,3}(`{3,}(?!.*`)|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const DEEPEST = 12; // lists in lists and quotes in quotes; what is deeper stays text
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Shows a text that may grow: blocks that did not change stay as they are. */
export function render(container, text, depth = 0) {
  const lines = text.split("\n");
  const blocks = depth < DEEPEST ? split(lines) : [{ kind: "paragraph", lines }];
  blocks.forEach((block, at) => {
    const source = `${block.kind}\n${block.lines.join("\n")}`;
    const old = container.children[at];
    if (old?.source === source) return;
    const made = BUILD[block.kind](block.lines, depth + 1);
    made.source = source;
    if (old) old.replaceWith(made);
    else container.append(made);
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
}

function split(lines) {
  const blocks = [];
  let at = 0;
  const take = (kind, end) => {
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  };
  const until = (stop) => {
    let end = at + 1;
    while (end < lines.length && !stop(lines[end], end)) end++;
    return end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at++;
    else if (FENCE.test(line)) {
      const fence = FENCE.exec(line)[1];
      const closes = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
      take("code", Math.min(until((other) => closes.test(other)) + 1, lines.length));
    } else if (HEADING.test(line)) take("heading", at + 1);
    else if (RULE.test(line)) take("rule", at + 1);
    else if (QUOTE.test(line)) take("quote", until((other) => !QUOTE.test(other)));
    else if (ITEM.test(line)) take("list", until((other, end) => endsList(lines, at, end)));
    else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? ""))
      take("table", until((other) => !other.includes("|")));
    else take("paragraph", until((other) => !other.trim() || [FENCE, HEADING, RULE, QUOTE, ITEM].some((start) => start.test(other))));
  }
  return blocks;
}

function endsList(lines, begin, end) {
  const line = lines[end];
  const ordered = (item) => /\d/.test(ITEM.exec(item)[2]);
  if (!line.trim()) return false;
  if (/^\s{2,}/.test(line)) return false;
  if (ITEM.test(line)) return RULE.test(line) || ordered(line) !== ordered(lines[begin]);
  return !lines[end - 1].trim() || FENCE.test(line) || HEADING.test(line);
}

const BUILD = {
  code(lines) {
    const [, fence, language] = FENCE.exec(lines[0]);
    const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
    const code = lines.slice(1, closed ? -1 : undefined).join("\n");
    const copy = element("button", "Copy");
    copy.type = "button";
    copy.className = "copy";
    const head = element("div", element("span", language), copy);
    head.className = "head";
    const figure = element("figure", head, element("pre", element("code", code)));
    figure.className = "code";
    return figure;
  },
  heading(lines) {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(marks.length + 2, 6)}`, ...inline(text));
  },
  rule: () => element("hr"),
  quote(lines, depth) {
    const quote = element("blockquote");
    render(quote, lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth);
    return quote;
  },
  list(lines, depth) {
    const first = ITEM.exec(lines[0]);
    const list = element(/\d/.test(first[2]) ? "ol" : "ul");
    if (list.tagName === "OL") list.start = parseInt(first[2], 10);
    const items = [];
    for (const line of lines) {
      const item = ITEM.exec(line);
      if (item && item[1].length < first[1].length + 2) items.push({ indent: item[0].length, lines: [line.slice(item[0].length)] });
      else items.at(-1).lines.push(line.slice(Math.min(items.at(-1).indent, line.search(/\S|$/))));
    }
    for (const item of items) {
      const entry = element("li");
      render(entry, item.lines.join("\n"), depth);
      list.append(entry);
    }
    return list;
  },
  table(lines) {
    const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
    const row = (line, tag) => element("tr", ...cells(line).map((cell) => element(tag, ...inline(cell))));
    const body = lines.slice(2).map((line) => row(line, "td"));
    const table = element("div", element("table", element("thead", row(lines[0], "th")), element("tbody", ...body)));
    table.className = "table";
    return table;
  },
  paragraph: (lines) => element("p", ...inline(lines.join("\n"))),
};

// the lengths are bounded, so that no text takes long
const INLINE = new RegExp(
  [
    "(?<ticks>`{1,3})(?<code>[^`](?:[^]{0,2000}?[^`])??)\\k<ticks>(?!`)",
    "\\*\\*(?<strong>\\S(?:[^]{0,2000}?\\S)??)\\*\\*(?!\\*)",
    "~~(?<del>\\S(?:[^]{0,2000}?\\S)??)~~",
    "\\*(?<em>[^\\s*](?:[^*]{0,2000}?[^\\s*])??)\\*",
    "(?<!\\w)_(?<em2>[^\\s_](?:[^_]{0,2000}?[^\\s_])??)_(?!\\w)",
    "\\[(?<text>[^\\]]{1,500})\\]\\((?<link>https?://[^\\s()]{1,2000}|mailto:[^\\s()]{1,300})\\)",
    "(?<bare>https?://[^\\s<>()\\[\\]\"'`*]{1,2000}[^\\s<>()\\[\\]\"'`*.,:;!?])",
    "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+.!~|>-])",
    "(?<br> {2,9}\\n|\\\\\\n)",
  ].join("|"),
  "g",
);

function inline(text, depth = 0) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(from, match.index));
    nodes.push(piece(match.groups, depth + 1));
    from = match.index + match[0].length;
  }
  return [...nodes, text.slice(from)];
}

function piece(found, depth) {
  if (found.code !== undefined) return element("code", found.code);
  if (found.escaped !== undefined) return found.escaped;
  if (found.br !== undefined) return element("br");
  if (found.strong !== undefined) return element("strong", ...inline(found.strong, depth));
  if (found.del !== undefined) return element("del", ...inline(found.del, depth));
  const emphasis = found.em ?? found.em2;
  if (emphasis !== undefined) return element("em", ...inline(emphasis, depth));
  const link = element("a", ...(found.bare ? [found.bare] : inline(found.text, depth)));
  link.href = found.bare ?? found.link;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}
