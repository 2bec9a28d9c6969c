"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const TERMS = ["despecification", "de-duplication", "dissimilarity", "rewind"];
const REWIND = 1 << TERMS.indexOf("rewind");
const PAGE = 16;

function source(number) {
  return data.pictures[number] ?? document.getElementById("picture-" + number).src;
}
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
for (const image of document.querySelectorAll("img[data-picture]")) image.src = source(image.dataset.picture);

// ---- one trace as runs: a new run starts where the step goes back (a rewind or a re-run)
function runs(panel) {
  if (panel.schedule === null) return [];
  const [steps, times, thresholds] = data.schedules[panel.schedule];
  const found = [];
  steps.forEach((step, i) => {
    if (i === 0 || step <= steps[i - 1]) found.push([]);
    found.at(-1).push({ step, t: times[i], threshold: thresholds[i], value: panel.values[i], terms: panel.terms[i] });
  });
  return found;
}
function bounds(panels) {
  let low = Infinity, high = -Infinity, last = 1, terms = 0;
  for (const panel of panels) {
    for (const entry of runs(panel).flat()) {
      last = Math.max(last, entry.step);
      terms |= entry.terms;
      for (const v of [entry.value, entry.threshold]) if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
    }
    if (panel.schedule !== null) { low = Math.min(low, panel.final, panel.promise); high = Math.max(high, panel.final, panel.promise); }
  }
  const margin = (high - low) * 0.06 || 0.05;
  return { low: low - margin, high: high + margin, last, terms };
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((f) => f * power >= raw * 0.999) * power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}
const path = (points) => points.map(([x, y], i) => (i ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1)).join("");

function shown(metric, value, digits = 3) {
  return ((metric === "nl2" ? -value : value) + 0).toFixed(digits);
}
function thresholdLine(found) {
  const at = new Map();
  for (const entry of found.flat()) at.set(entry.step, entry.threshold);
  return [...at].sort((a, b) => a[0] - b[0]);
}

function plot(panel, metric, box, width) {
  const found = runs(panel);
  if (!found.length) return make("p", {}, "No step was recorded for this picture.");
  const lanes = TERMS.map((name, i) => [name, 1 << i]).filter(([, bit]) => box.terms & bit);
  const left = 74, right = width - 12, top = 8, bottom = 168, laneTop = bottom + 30;
  const x = (step) => left + ((right - left) * step) / (box.last + 1);
  const y = (v) => bottom - ((bottom - top) * (v - box.low)) / (box.high - box.low);
  const height = laneTop + lanes.length * 15 + 2;
  const label = `${panel.column}: ${panel.value}, ${found.length - 1} times back to an earlier step`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const line = thresholdLine(found).map(([step, v]) => [x(step), y(v)]);
  line.push([right, line.at(-1)[1]]);
  svg.append(draw("path", { class: "g-zone", d: path([...line, [right, top], [line[0][0], top]]) + "Z" }));
  for (const v of ticks(box.low, box.high, 4)) {
    svg.append(draw("line", { class: "g-grid", x1: left, x2: right, y1: y(v), y2: y(v) }));
    svg.append(draw("text", { x: left - 8, y: y(v) + 4, "text-anchor": "end" }, +shown(metric, v) + ""));
  }
  svg.append(draw("text", { x: 0, y: top + 10 }, metric === "nl2" ? "nL2" : "cosine"));
  for (const step of ticks(0, box.last, 5)) svg.append(draw("text", { x: x(step), y: bottom + 16, "text-anchor": "middle" }, step + ""));
  svg.append(draw("text", { x: left - 8, y: bottom + 16, "text-anchor": "end" }, "step"));
  svg.append(draw("path", { class: "g-threshold", d: path(line) }));
  lanes.forEach(([name], i) => {
    const at = laneTop + 15 * i + 4;
    svg.append(draw("line", { class: "g-lane", x1: left, x2: right, y1: at, y2: at }));
    svg.append(draw("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, name === "de-duplication" ? "de-dup." : name === "despecification" ? "despec." : name));
  });
  found.forEach((run, r) => drawRun(svg, run, found[r + 1], lanes, { x, y, laneTop, metric, past: r < found.length - 1 }));
  const fx = x(box.last + 1), fy = y(panel.final), state = panel.state === "blocked" ? "blocked" : panel.state;
  svg.append(draw("line", { class: "g-promise", x1: fx - 8, x2: fx + 8, y1: y(panel.promise), y2: y(panel.promise) }));
  const final = draw("path", { class: "g-final " + state, d: `M${fx - 6} ${fy}L${fx} ${fy - 6}L${fx + 6} ${fy}L${fx} ${fy + 6}Z` });
  final.append(draw("title", {}, `delivered picture: ${panel.value}`));
  svg.append(final);
  return svg;
}
function drawRun(svg, run, next, lanes, { x, y, laneTop, metric, past }) {
  const measured = run.filter((entry) => entry.value !== null), suffix = past ? " past" : "";
  const points = measured.map((entry) => [x(entry.step), y(entry.value)]);
  if (points.length) svg.append(draw("path", { class: "g-line" + (past ? " g-past" : ""), d: path(points) }));
  const target = next && next.find((entry) => entry.value !== null);
  if (points.length && target) svg.append(draw("path", { class: "g-jump", d: path([points.at(-1), [x(target.step), y(target.value)]]) }));
  measured.forEach((entry, i) => {
    const state = entry.value > entry.threshold ? "warm" : "cool";
    const dot = draw("circle", { class: `g-dot ${state}${suffix}`, cx: points[i][0].toFixed(1), cy: points[i][1].toFixed(1), r: past ? 1.8 : 2.4 });
    const fired = TERMS.filter((_, b) => entry.terms & (1 << b)).join(", ");
    dot.append(draw("title", {}, `step ${entry.step} (t = ${entry.t}): ${shown(metric, entry.value)}, threshold ${shown(metric, entry.threshold)}${fired ? ", " + fired : ""}`));
    svg.append(dot);
  });
  lanes.forEach(([, bit], i) => {
    for (const entry of run) if (entry.terms & bit) svg.append(draw("rect", { class: "g-fired" + (bit === REWIND ? "" : suffix), x: (x(entry.step) - 1.5).toFixed(1), y: laneTop + 15 * i, width: 3, height: 9, rx: 1 }));
  });
}

// ---- a small plot per row: the baseline in warm, the last column in cool, over the threshold
function spark(host, sample) {
  const panels = [sample.panels[0], sample.panels.at(-1)].filter((panel) => panel.schedule !== null);
  if (!panels.length) return;
  const box = bounds(panels), width = 340, height = 64;
  const x = (step) => 2 + ((width - 8) * step) / box.last;
  const y = (v) => height - 3 - ((height - 6) * (v - box.low)) / (box.high - box.low);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}` });
  const line = thresholdLine(runs(panels.at(-1))).map(([step, v]) => [x(step), y(v)]);
  svg.append(draw("path", { class: "g-zone", d: path([...line, [line.at(-1)[0], 0], [line[0][0], 0]]) + "Z" }));
  panels.forEach((panel, i) => {
    const points = runs(panel).at(-1).filter((entry) => entry.value !== null).map((entry) => [x(entry.step), y(entry.value)]);
    if (!points.length) return;
    svg.append(draw("path", { class: "g-line " + panel.state, d: path(points) }));
    svg.append(draw("circle", { class: "g-dot " + panel.state, cx: points.at(-1)[0], cy: points.at(-1)[1], r: 3.5 }));
  });
  host.append(svg);
}

// ---- the dialog
const dialog = document.getElementById("detail");
let current = null;
function shot(label, number, state, alt) {
  const image = make("img", { class: "picture", src: source(number), alt });
  return make("figure", { class: "shot " + state }, make("div", { class: "frame" }, image), make("figcaption", {}, label));
}
function panelNode(panel) {
  const head = make("h3", { class: panel.state }, panel.column, make("span", { class: "value" }, panel.value));
  const shots = make("div", { class: "shots" }, shot(panel.column, panel.picture, panel.state, panel.column));
  if (panel.nearest !== null) shots.append(shot("its nearest training image", panel.nearest, "training", "training image nearest to " + panel.column));
  const facts = make("dl");
  for (const [name, text] of panel.facts) facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, text)));
  return make("article", { class: "panel" }, head, shots, make("div", { class: "plot" }), facts);
}
function show(sectionNumber, sampleNumber) {
  const section = data.sections[sectionNumber], sample = section.samples[sampleNumber];
  current = [sectionNumber, sampleNumber];
  dialog.querySelector("h2").textContent = sample.title;
  dialog.querySelector(".meta").textContent = `${sample.kind}, seed ${sample.seed}`;
  const nodes = sample.panels.map(panelNode), box = bounds(sample.panels);
  dialog.querySelector(".panels").replaceChildren(...nodes);
  if (!dialog.open) dialog.showModal();
  nodes.forEach((node, i) => {
    const host = node.querySelector(".plot");
    host.append(plot(sample.panels[i], section.metric, box, Math.max(280, host.clientWidth)));
  });
  dialog.scrollTop = 0;
  history.replaceState(null, "", `#sample-${sectionNumber + 1}-${sampleNumber + 1}`);
}
function move(by) {
  const section = document.querySelector(`[data-section="${current[0]}"]`);
  const numbers = matching(section).map((row) => +row.dataset.open);
  const at = numbers.indexOf(current[1]);
  show(current[0], numbers[(at + by + numbers.length) % numbers.length] ?? current[1]);
}
dialog.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (event.target === dialog || button?.hasAttribute("data-close")) dialog.close();
  else if (button) move(+button.dataset.move);
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));

// ---- filters, rows shown by and by
function matching(section) {
  const kind = section.querySelector("input[type=radio]:checked")?.value ?? "";
  const memorised = section.querySelector(".memorised-only")?.checked;
  return [...section.querySelectorAll(".sample")].filter(
    (row) => (!kind || row.dataset.kind === kind) && (!memorised || row.hasAttribute("data-memorised")));
}
for (const section of document.querySelectorAll("[data-section]")) {
  const samples = data.sections[section.dataset.section].samples;
  const more = section.querySelector(".more");
  let limit = PAGE;
  const refresh = () => {
    const rows = matching(section), visible = new Set(rows.slice(0, limit));
    for (const row of section.querySelectorAll(".sample")) {
      row.hidden = !visible.has(row);
      const host = row.querySelector(".spark");
      if (!row.hidden && !host.childNodes.length) spark(host, samples[row.dataset.open]);
    }
    more.hidden = rows.length <= limit;
    more.textContent = `Show ${rows.length - limit} more`;
    section.querySelector(".shown").textContent = `${visible.size} of ${rows.length} shown`;
  };
  if (!more) continue;
  section.querySelector(".controls").addEventListener("change", () => { limit = PAGE; refresh(); });
  more.addEventListener("click", () => { limit = Infinity; refresh(); });
  section.addEventListener("click", (event) => {
    const row = event.target.closest("[data-open]");
    if (row && !getSelection().toString()) show(+section.dataset.section, +row.dataset.open);
  });
  refresh();
}
const linked = location.hash.match(/^#sample-(\d+)-(\d+)$/);
if (linked && data.sections[linked[1] - 1]?.samples[linked[2] - 1]) show(linked[1] - 1, linked[2] - 1);
