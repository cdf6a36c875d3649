"use strict";
let known; // what runs are shown with: megabytes, which are read when the first one is opened
const data = () => (known ??= JSON.parse(document.getElementById("data").textContent));
const rows = [...document.getElementById("rows").rows];
const query = document.getElementById("query");
const dialog = document.getElementById("run");

// Every word must be found: `mode=welore` as a whole, `err<0.4` as a number, and any other as a part.
function matches(words, term) {
  const comparison = term.match(/^([\w.]+)(<=|>=|<|>)(-?[\d.e-]+)$/);
  if (comparison) {
    const [, key, sign, limit] = comparison;
    const word = words.find((w) => w.startsWith(key + "="));
    const value = word === undefined ? NaN : Number(word.slice(key.length + 1));
    const holds = { "<": value < limit, ">": value > limit, "<=": value <= limit, ">=": value >= limit };
    return holds[sign];
  }
  return term.includes("=") ? words.includes(term) : words.some((w) => w.includes(term));
}

function show(chosen) {
  let count = 0;
  for (const row of rows) {
    row.hidden = !chosen(row);
    count += row.hidden ? 0 : 1;
  }
  const number = (n) => n.toLocaleString("en-US");
  document.getElementById("found").textContent = `${number(count)} of ${number(rows.length)} runs`;
}

function search(text) {
  const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
  show((row) => {
    const words = row.dataset.words.split(" ");
    return terms.every((term) => matches(words, term));
  });
}

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function drawn(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function written(value) {
  if (typeof value !== "number") return value === null ? "—" : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e7
    ? value.toLocaleString("en-US", { maximumSignificantDigits: 6 }) : value.toExponential(4);
}

function table(pairs) {
  const line = ([name, value]) => element("tr", {},
    element("th", { scope: "row", textContent: name }), element("td", { textContent: written(value) }));
  return element("table", {}, element("tbody", {}, ...pairs.map(line)));
}

// One curve with its range; a number that is not finite was written as null and interrupts nothing.
function chart(key, points) {
  const { titles } = data();
  const [width, height, left, bottom] = [420, 190, 52, 26];
  const known = points.filter(([, y]) => Number.isFinite(y));
  const xs = known.map(([x]) => x), ys = known.map(([, y]) => y);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - 12);
  const py = (y) => 10 + ((y1 - y) / (y1 - y0 || 1)) * (height - bottom - 16);
  const title = titles[key] || key;
  const label = `${title}: ${written(ys[0])} at step ${xs[0]}, ${written(ys.at(-1))} at step ${xs.at(-1)}`;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const y of y0 === y1 ? [y0] : [y0, (y0 + y1) / 2, y1]) {
    svg.append(drawn("line", { x1: left, x2: width - 12, y1: py(y), y2: py(y) }));
    const short = y.toLocaleString("en-US", { maximumSignificantDigits: 4 });
    svg.append(drawn("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, short));
  }
  for (const [x, anchor] of x0 === x1 ? [[x0, "middle"]] : [[x0, "start"], [x1, "end"]]) {
    svg.append(drawn("text", { x: px(x), y: height - 6, "text-anchor": anchor }, `step ${x.toLocaleString("en-US")}`));
  }
  svg.append(drawn("polyline", { points: known.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ") }));
  if (known.length <= 12) for (const [x, y] of known) svg.append(drawn("circle", { cx: px(x), cy: py(y), r: 2.5 }));
  return element("figure", { className: "chart" }, element("figcaption", { textContent: title }), svg);
}

function part(title, ...content) {
  return content.length ? [element("h3", { textContent: title }), ...content] : [];
}

function open(name) {
  const { facts, titles, runs } = data();
  const run = runs[name];
  if (!run) return;
  const origin = [["status", run.status], ["folder", run.folder], ["fingerprint", name], ["commit of the code", run.commit],
    ["started", run.started], ["seconds", run.seconds], ...Object.entries(run.environment)];
  const results = Object.entries(run.metrics).map(([key, value]) => [titles[key] ? `${titles[key]} (${key})` : key, value]);
  const config = run.config.map((i) => facts[i]).map((fact) => {
    const cut = fact.indexOf("=");
    return [fact.slice(0, cut), fact.slice(cut + 1)];
  });
  const curves = Object.entries(run.curves).filter(([, points]) => points.some(([, y]) => Number.isFinite(y)));
  const close = element("button", { type: "button", textContent: "Close" });
  close.addEventListener("click", () => dialog.close());
  const title = element("h2", { id: "run-title" }, `Run ${name}`);
  dialog.replaceChildren(
    element("div", { className: "top" }, title, close),
    element("div", { className: "body" },
      ...(run.error ? part("Why it failed", element("pre", { className: "wide", textContent: run.error })) : []),
      ...(curves.length ? part("Curves", element("div", { className: "charts" }, ...curves.map(([k, p]) => chart(k, p)))) : []),
      ...part("Where it comes from", table(origin)),
      ...(run.command ? part("Command", element("pre", { className: "wide", textContent: run.command })) : []),
      ...part("What was measured", table(results)),
      ...part("Config", table(config))));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

// Artefacts that were never in view are laid out on the way, which moves what is below them: once more, then.
function reveal() {
  const list = document.getElementById("list");
  list.scrollIntoView();
  for (const wait of [50, 200]) setTimeout(() => list.scrollIntoView(), wait);
}

// The address says what is shown, so that it can be sent to others: #q=SEARCH, #run=NAME, #runs=NAME,NAME.
function follow() {
  let address = location.hash.slice(1);
  try {
    address = decodeURIComponent(address);
  } catch {} // a lone % in what somebody typed
  const [key, value] = address.split(/=(.*)/s);
  if (key !== "run" && dialog.open) dialog.close();
  if (key === "run") open(value);
  if (key === "q") {
    query.value = value;
    search(value);
    reveal();
  }
  if (key === "runs") {
    const names = value.split(",");
    if (names.length === 1) return open(names[0]);
    query.value = "";
    show((row) => names.includes(row.dataset.run));
    reveal();
  }
}

query.addEventListener("input", () => search(query.value));
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  history.replaceState(null, "", "#q=" + encodeURIComponent(query.value));
});
dialog.addEventListener("close", () => {
  if (/^#runs?=/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
window.addEventListener("hashchange", follow);
follow();
