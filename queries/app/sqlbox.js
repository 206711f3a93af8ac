// A text area that completes tables, columns, functions and named queries. Ctrl-Enter sends the query.
const MOST = 12;

function candidates(words, text, at) {
  const before = text.slice(0, at);
  const dotted = /(\w+)\.(\w*)$/.exec(before);
  const tables = words.tables || {};
  if (dotted && tables[dotted[1]]) {
    return { typed: dotted[2], found: tables[dotted[1]].map((name) => ({ name, kind: dotted[1], put: name })) };
  }
  const typed = (/[A-Za-z_]\w*$/.exec(before) || [""])[0];
  const used = Object.keys(tables).filter((name) => new RegExp(`\\b${name}\\b`).test(text));
  const columns = new Map();
  for (const table of [...used, ...Object.keys(tables)])
    for (const name of tables[table]) if (!columns.has(name)) columns.set(name, table);
  const found = [
    ...Object.keys(tables).map((name) => ({ name, kind: "table", put: name })),
    ...[...columns].map(([name, table]) => ({ name, kind: `column of ${table}`, put: name, near: used.includes(table) })),
    ...(words.functions || []).map((name) => ({ name, kind: "function", put: name })),
    ...Object.entries(words.queries || {}).map(([name, sql]) => ({ name, kind: "named query", put: sql, whole: true })),
    ...(words.keywords || []).map((name) => ({ name, kind: "", put: name })),
  ];
  return { typed, found };
}

function matching(words, text, at) {
  const { typed, found } = candidates(words, text, at);
  if (!typed && !/\.$/.test(text.slice(0, at))) return { typed, found: [] };
  const low = typed.toLowerCase();
  const rank = (one) => (one.name.toLowerCase().startsWith(low) ? 0 : 2) - (one.near ? 1 : 0);
  const fits = found.filter((one) => one.name.toLowerCase().includes(low) && one.name.toLowerCase() !== low);
  return { typed, found: fits.sort((a, b) => rank(a) - rank(b) || a.name.length - b.name.length).slice(0, MOST) };
}

const STYLE = `
.sqlbox { position: relative; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 14px; }
.sqlbox textarea { width: 100%; box-sizing: border-box; min-height: 7.5em; font: inherit; padding: 8px; border: 1px solid #999;
  border-radius: 4px; background: #fff; color: #1a1a1a; resize: vertical; }
.sqlbox ul { position: absolute; z-index: 50; left: 8px; margin: 0; padding: 2px; list-style: none; background: #fff;
  color: #1a1a1a; border: 1px solid #999; border-radius: 4px; box-shadow: 0 2px 8px #0003; max-width: 95%; }
.sqlbox li { padding: 2px 8px; cursor: pointer; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.sqlbox li[aria-selected="true"] { background: #0072B2; color: #fff; }
.sqlbox li small { opacity: 0.7; margin-left: 1.5em; }
.sqlbox button { font: inherit; margin-top: 4px; padding: 3px 14px; border: 1px solid #0072B2; border-radius: 4px;
  background: #0072B2; color: #fff; cursor: pointer; }
.sqlbox em { font-style: normal; opacity: 0.65; margin-left: 1em; font-size: 12px; }
`;

function render({ model, el }) {
  const style = document.createElement("style");
  style.textContent = STYLE;
  const box = document.createElement("div");
  box.className = "sqlbox";
  const area = document.createElement("textarea");
  area.spellcheck = false;
  area.setAttribute("aria-label", "SQL");
  area.value = model.get("text");
  const list = document.createElement("ul");
  list.hidden = true;
  const run = document.createElement("button");
  run.textContent = "Run";
  const hint = document.createElement("em");
  hint.textContent = "Ctrl-Enter runs; Tab completes; Escape closes the list";
  box.append(area, list, document.createElement("br"), run, hint);
  el.append(style, box);
  let found = [], typed = "", at = 0;

  const close = () => { found = []; list.hidden = true; };
  const choose = (i) => {
    at = (i + found.length) % found.length;
    [...list.children].forEach((item, k) => item.setAttribute("aria-selected", String(k === at)));
  };
  const put = (one) => {
    const end = area.selectionStart, start = end - typed.length;
    if (one.whole) { area.value = one.put; area.selectionStart = area.selectionEnd = 0; }
    else area.setRangeText(one.put, start, end, "end");
    model.set("text", area.value);
    close();
    area.focus();
  };
  const complete = () => {
    ({ typed, found } = matching(model.get("words"), area.value, area.selectionStart));
    list.replaceChildren(...found.map((one) => {
      const item = document.createElement("li"), kind = document.createElement("small");
      item.textContent = one.name;
      kind.textContent = one.kind;
      item.append(kind);
      item.addEventListener("mousedown", (event) => { event.preventDefault(); put(one); });
      return item;
    }));
    const lines = area.value.slice(0, area.selectionStart).split("\n").length;
    list.style.top = `${Math.min(12 + 21 * lines, area.offsetHeight)}px`;
    list.hidden = !found.length;
    if (found.length) choose(0);
  };
  const send = () => {
    close();
    model.set("text", area.value);
    model.set("asked", area.value);
    model.set("times", model.get("times") + 1);
    model.save_changes();
  };
  area.addEventListener("input", () => { model.set("text", area.value); complete(); });
  area.addEventListener("blur", close);
  area.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); return; }
    if (list.hidden) return;
    if (event.key === "Tab" || event.key === "Enter") { event.preventDefault(); put(found[at]); }
    else if (event.key === "ArrowDown") { event.preventDefault(); choose(at + 1); }
    else if (event.key === "ArrowUp") { event.preventDefault(); choose(at - 1); }
    else if (event.key === "Escape") { event.preventDefault(); close(); }
  });
  run.addEventListener("click", send);
  const changed = () => { if (model.get("text") !== area.value) area.value = model.get("text"); };
  model.on("change:text", changed);
  return () => model.off("change:text", changed);
}

export default { render };
