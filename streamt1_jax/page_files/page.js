"use strict";
// Draws the run in the JSON element `data`; what a user wrote goes in as text, never as markup.
const run = JSON.parse(document.getElementById("data").textContent);
const { chunks, info, fps } = run;
const byId = (id) => document.getElementById(id);
// Three decimals, or three digits of what is smaller: some rewards differ in the fifth decimal only.
function number(x) {
  if (x === null) return "not finite";
  const size = Math.abs(x);
  return (size >= 1000 ? x.toPrecision(4) : size >= 0.1 || x === 0 ? x.toFixed(3) : x.toPrecision(3)).replaceAll("-", "\u2212");
}
const colour = (name) => `var(--${name})`;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function rows(pairs) {
  return make("table", {}, ...pairs.map(([key, value]) => make("tr", {}, make("td", {}, key), make("td", {}, String(value)))));
}

function key(id, entries) {
  byId(id).append(...entries.map(([name, text, shape]) => make("span", { style: `--c:${colour(name)}` }, make("i", { class: shape || "" }), text)));
}

// A card beside the pointer.
const tip = byId("tip");
function explain(element, title, pairs) {
  const show = (event) => {
    tip.replaceChildren(make("b", {}, title), rows(pairs()));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
  };
  element.addEventListener("mousemove", show);
  element.addEventListener("mouseleave", () => { tip.hidden = true; });
}

const winners = chunks.map((chunk) => chunk.candidates[chunk.winner]);
const fates = new Map(run.lanes.filter((lane) => lane.fate).map((lane) => [lane.chunk, lane.fate.kind]));
const sinks = new Set(run.lanes.filter((lane) => lane.spans.some(([kind]) => kind === "sink")).map((lane) => lane.chunk));
const fateOf = (chunk) => fates.get(chunk) || (sinks.has(chunk) ? "sink" : null);
const switched = new Map(run.switches.map((entry) => [entry.chunk, entry]));

// --- the video, and which chunk of it is shown

const video = byId("video");
const bytes = Uint8Array.from(atob(byId("mp4").textContent), (c) => c.charCodeAt(0));
video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
video.addEventListener("loadeddata", () => { document.body.dataset.video = `${video.videoWidth}x${video.videoHeight}`; });
video.addEventListener("error", () => { document.body.dataset.video = "error"; });
if (winners[0].picture) video.poster = winners[0].picture;
const listeners = [];
function goTo(index) { video.currentTime = chunks[index].time + 0.5 / fps; }
function shown() {
  let index = 0;
  chunks.forEach((chunk, i) => { if (chunk.time <= video.currentTime + 1e-6) index = i; });
  listeners.forEach((listener) => listener(index));
}
video.addEventListener("timeupdate", shown);
video.addEventListener("seeked", shown);

function strip() {
  const buttons = chunks.map((chunk) => {
    const button = make("button", { title: `chunk ${chunk.index}, ${chunk.time.toFixed(2)} s`, class: switched.has(chunk.index) ? "switch" : "" });
    button.addEventListener("click", () => goTo(chunk.index));
    return button;
  });
  byId("strip").append(...buttons);
  listeners.push((now) => buttons.forEach((button, i) => button.classList.toggle("now", i === now)));
}

function head() {
  for (const entry of run.switches) {
    byId("switches").append(make("li", {}, make("b", {}, `${chunks[entry.chunk].time.toFixed(2)} s`), entry.prompt,
      make("small", {}, entry.sinks ? "sinks replaced" : "sinks kept")));
  }
  const notes = [];
  if (info.complete === false) notes.push("This run was interrupted: the page shows what exists so far.");
  if (info.weights && info.weights.trained === false) notes.push(`The weights are ${info.weights.summary}.`);
  if (notes.length) { byId("notice").textContent = notes.join(" "); byId("notice").hidden = false; }
}

function facts() {
  const all = chunks.flatMap((chunk) => chunk.candidates);
  const kept = chunks[chunks.length - 1].candidates.filter((c) => c.kept !== null).length;
  const routes = {};
  fates.forEach((kind) => { routes[kind] = (routes[kind] || 0) + 1; });
  const list = [["Chunks", chunks.length], ["Candidates tried", all.length], ["Beams kept", kept]];
  if (Object.keys(routes).length) list.push(["Left the window", Object.entries(routes).map(([k, n]) => `${n} ${k}`).join(", ")]);
  const broken = all.filter((c) => !c.finite).length;
  if (broken) list.push(["Not finite", broken]);
  if (info.rewards) list.push(["Rewards", [...new Set(Object.values(info.rewards))].join(", ")]);
  if (info.size) list.push(["Size", `${info.size.width}\u00d7${info.size.height}, ${fps} frames/s`]);
  list.push(["Seed", info.seed]);
  if (info.weights) list.push(["Weights", info.weights.name || info.weights.summary]);
  if (info.device) list.push(["Device", `${info.device.kind}, ${info.dtype}`]);
  if (info.seconds) list.push(["Time", `${info.seconds.total.toFixed(1)} s in all`]);
  const steady = chunks.slice(2).map((chunk) => chunk.seconds).sort((a, b) => a - b);
  if (steady.length) list.push(["A chunk", `${steady[steady.length >> 1].toFixed(3)} s (median after the first two)`]);
  if (info.saving) list.push(["Saving state", `${info.saving.seconds_per_chunk.toFixed(3)} s a chunk`]);
  const best = run.final_scores.length ? run.final_scores[run.winner] : winners[winners.length - 1].score;
  byId("facts").append(make("div", { class: "big" }, make("strong", {}, number(best)), make("span", {}, "score of the whole video")));
  for (const [name, value] of list) byId("facts").append(make("dt", {}, name), make("dd", {}, String(value ?? "")));
}

// --- scores

function scores() {
  const width = 1180, height = 300, left = 56, right = 16, top = 12, bottom = 28;
  const values = chunks.flatMap((c) => c.candidates.flatMap((x) => [x.score, x.short, x.long])).filter((x) => x !== null);
  let low = Math.min(...values), high = Math.max(...values);
  if (!values.length) { low = 0; high = 1; }
  if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
  const margin = 0.06 * (high - low); low -= margin; high += margin;
  const step = (width - left - right) / chunks.length;
  const x = (i) => left + step * (i + 0.5), y = (v) => top + (high - v) / (high - low) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": "scores of every chunk" });
  const band = svg.appendChild(draw("rect", { class: "now-band", y: top, height: height - top - bottom, width: step, x: left }));
  listeners.push((now) => band.setAttribute("x", left + step * now));
  for (const tick of ticks(low, high)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(+tick.toPrecision(6)).replace("-", "\u2212")));
  }
  const every = Math.ceil(chunks.length / 30);
  chunks.forEach((chunk, i) => {
    if (i % every === 0) svg.append(draw("text", { x: x(i), y: height - 8, "text-anchor": "middle" }, chunk.index));
    if (switched.has(chunk.index)) svg.append(draw("line", { class: "mark", x1: left + step * i, x2: left + step * i, y1: top, y2: height - bottom }));
    for (const c of chunk.candidates) {
      if (c.score !== null) svg.append(draw("circle", { cx: x(i), cy: y(c.score), r: c.kept === null ? 2.4 : 3.2, fill: colour(c.kept === null ? "quiet" : "kept") }));
    }
  });
  const line = (name, stroke, wide) => {
    const points = winners.map((c, i) => [x(i), c[name]]).filter((p) => p[1] !== null).map((p) => `${p[0]},${y(p[1])}`);
    svg.append(draw("polyline", { points: points.join(" "), fill: "none", stroke: colour(stroke), "stroke-width": wide, "stroke-linejoin": "round" }));
    if (points.length === 1) svg.append(draw("circle", { cx: points[0].split(",")[0], cy: points[0].split(",")[1], r: 3.5, fill: colour(stroke) }));
  };
  line("short", "short", 1.4); line("long", "long", 1.4); line("score", "winner", 2.6);
  chunks.forEach((chunk, i) => {
    const hit = draw("rect", { class: "hit", x: left + step * i, y: top, width: step, height: height - top - bottom });
    hit.addEventListener("click", () => goTo(i));
    const finite = chunk.candidates.map((c) => c.score).filter((v) => v !== null);
    explain(hit, `chunk ${chunk.index}`, () => [["score", number(winners[i].score)], ["short", number(winners[i].short)],
      ["long", number(winners[i].long)], ["weight of short", chunk.alpha.toFixed(2)],
      ["range", finite.length ? `${number(Math.min(...finite))} to ${number(Math.max(...finite))}` : "none"]]);
    svg.append(hit);
  });
  byId("scores").append(svg);
  key("score-key", [["winner", "score of the video's path"], ["short", "its short reward"], ["long", "its long reward"],
    ["kept", "kept candidate", "dot"], ["quiet", "pruned candidate", "dot"], ...(switched.size ? [["winner", "prompt switch", "dash"]] : [])]);
}

function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(v);
  return found;
}

// --- the search tree

function tree() {
  const most = Math.max(...chunks.map((c) => c.candidates.length));
  const shape = info.size ? info.size.height / info.size.width : 0.6;
  const wide = 104, tall = Math.round(wide * Math.min(Math.max(shape, 0.3), 1.6)), gapX = 44, gapY = 30, top = 44;
  const width = chunks.length * (wide + gapX), height = top + most * (tall + gapY);
  const left = (i) => gapX / 2 + i * (wide + gapX), up = (j) => top + j * (tall + gapY);
  const canvas = make("div", { class: "canvas", style: `width:${width}px;height:${height}px` });
  const svg = draw("svg", { width, height });
  const heads = [];
  canvas.append(svg);
  const edges = [];
  chunks.forEach((chunk, i) => {
    const title = make("div", { class: `head${switched.has(chunk.index) ? " switch" : ""}`, style: `left:${left(i)}px;top:2px;width:${wide}px` }, `chunk ${chunk.index}`,
      make("small", {}, `${chunk.time.toFixed(2)} s`));
    title.addEventListener("click", () => goTo(i));
    heads.push(title);
    canvas.append(title);
    chunk.candidates.forEach((candidate, j) => {
      const won = j === chunk.winner, rank = won ? 2 : candidate.kept !== null ? 1 : 0;
      if (candidate.parent !== null) {
        const x0 = left(i - 1) + wide, x1 = left(i), y0 = up(candidate.parent) + tall / 2, y1 = up(j) + tall / 2, m = (x0 + x1) / 2;
        edges.push([rank, draw("path", { d: `M${x0},${y0} C${m},${y0} ${m},${y1} ${x1},${y1}`, fill: "none",
          stroke: colour(["quiet", "kept", "winner"][rank]), "stroke-width": [1, 1.8, 3][rank] })]);
      }
      canvas.append(cell(chunk, candidate, i, j, rank, `left:${left(i)}px;top:${up(j)}px;width:${wide}px`, tall));
    });
  });
  edges.sort((a, b) => a[0] - b[0]).forEach(([, edge]) => svg.append(edge));
  listeners.push((now) => heads.forEach((title, i) => title.classList.toggle("now", i === now)));
  byId("tree").append(canvas);
  key("tree-key", [["winner", "the video's path"], ["kept", "kept beam"], ["quiet", "pruned"],
    ...["sink", "append", "ema", "discard"].filter((kind) => chunks.some((c) => fateOf(c.index) === kind)).map((kind) => [kind, kind, "block"])]);
}

function cell(chunk, candidate, i, j, rank, place, tall) {
  const classes = ["cell", ["pruned", "kept", "kept winner"][rank], candidate.finite ? "" : "broken"].join(" ");
  const frame = make("span", { class: "frame", style: `height:${tall}px` });
  if (candidate.picture) frame.append(make("img", { src: candidate.picture, alt: `chunk ${chunk.index}, candidate ${j}` }));
  const fate = rank === 2 ? fateOf(chunk.index) : null;
  if (fate) frame.append(make("span", { class: "pill", style: `--c:${colour(fate)}` }, fate));
  const made = make("button", { class: classes, style: place }, frame, make("b", {}, number(candidate.score)));
  made.addEventListener("click", () => goTo(i));
  const state = rank === 2 ? "became the video" : rank === 1 ? `kept as beam ${candidate.kept}` : "pruned";
  explain(made, `chunk ${chunk.index}, candidate ${j}`, () => [["score", number(candidate.score)], ["short", number(candidate.short)],
    ["long", number(candidate.long)], ["seed", candidate.seed], ["flag", candidate.flag], ["sinks seen", `${candidate.sinks} latent frames`], ["", state]]);
  return made;
}

// --- the sinks

function memory() {
  const left = 78, row = 17, top = 24, step = Math.max(22, (byId("memory").clientWidth - left - 20) / (chunks.length + 0.3)), height = top + run.lanes.length * row + 8;
  const width = left + (chunks.length + 0.3) * step, x = (i) => left + step * i, y = (i) => top + row * i;
  const svg = draw("svg", { width, height, role: "img", "aria-label": "what the cache held" });
  const band = svg.appendChild(draw("rect", { class: "now-band", x: left, y: 0, width: step, height }));
  listeners.push((now) => band.setAttribute("x", x(now)));
  const every = Math.ceil(26 / step);
  chunks.forEach((chunk, i) => {
    svg.append(draw("line", { class: "grid", x1: x(i), x2: x(i), y1: top - 4, y2: height }));
    if (i % every === 0) svg.append(draw("text", { x: x(i) + step / 2, y: 14, "text-anchor": "middle" }, chunk.index));
  });
  run.lanes.forEach((lane, i) => {
    svg.append(draw("text", { x: left - 10, y: y(i) + 12, "text-anchor": "end" }, `chunk ${lane.chunk}`));
    svg.append(draw("rect", { x: x(i) + 2, y: y(i) + 3, width: step - 4, height: row - 6, rx: 3, fill: "none", stroke: colour("quiet") }));
    for (const [kind, first, last] of lane.spans) {
      svg.append(draw("rect", { "data-span": kind, x: x(first) + 1, y: y(i) + 3, width: step * (last - first + 1) - 2, height: row - 6, rx: 3, fill: colour(kind) }));
    }
    if (lane.fate) fate(svg, lane, x(lane.fate.at), y(i) + row / 2, (into) => y(into) + row / 2);
    const hit = draw("rect", { class: "hit", x: 0, y: y(i), width, height: row });
    hit.addEventListener("click", () => goTo(i));
    explain(hit, `chunk ${lane.chunk}`, () => [...lane.spans.map(([kind, first, last]) => [kind, `chunks ${first} to ${last}`]),
      ...(lane.fate ? [["left", words(lane.fate)]] : [])]);
    svg.append(hit);
  });
  run.switches.forEach((entry) => svg.append(draw("line", { class: "mark", x1: x(entry.chunk), x2: x(entry.chunk), y1: 0, y2: height })));
  byId("memory").append(svg);
  key("memory-key", [["quiet", "made"], ["sink", "first sink"], ["window", "in the window"], ["append", "appended as a sink"],
    ["ema", "\u25c6 merged into a sink"], ["discard", "\u00d7 dropped"], ...(switched.size ? [["winner", "prompt switch", "dash"]] : [])]
    .map(([name, text, shape]) => [name, text, shape || "block"]));
}

function words(fate) {
  return fate.kind === "ema" ? `merged into the sink of chunk ${fate.into}` : fate.kind === "append" ? "appended as a sink" : "dropped";
}

function fate(svg, lane, x, y, rowOf) {
  if (lane.fate.kind === "discard") {
    svg.append(draw("path", { d: `M${x + 2},${y - 4} l8,8 m0,-8 l-8,8`, stroke: colour("discard"), "stroke-width": 1.8 }));
  } else if (lane.fate.kind === "ema") {
    const to = rowOf(lane.fate.into);
    svg.append(draw("path", { d: `M${x + 6},${y} V${to}`, stroke: colour("ema"), "stroke-width": 1.3, "stroke-dasharray": "2 2" }),
      draw("path", { d: `M${x + 6},${y - 5} l5,5 l-5,5 l-5,-5 z`, fill: colour("ema") }),
      draw("circle", { cx: x + 6, cy: to, r: 2.4, fill: colour("ema") }));
  }
}

// --- settings

function settings() {
  const flat = (value) => Array.isArray(value) ? value.join(", ") : value === null ? "none" : value;
  const plain = (object) => Object.entries(object).filter(([, v]) => v === null || typeof v !== "object" || Array.isArray(v)).map(([k, v]) => [k, flat(v)]);
  const parts = [["Stream", info.config && info.config.stream], ["Search", info.config && info.config.search], ["Weights", info.weights],
    ["Device", info.device], ["Versions", info.versions], ["sha256", info.sha256]];
  for (const [name, object] of parts) if (object) byId("settings").append(make("div", {}, make("h3", {}, name), rows(plain(object))));
}

head(); strip(); facts(); scores(); tree(); memory(); settings(); shown();
document.body.dataset.ready = "yes";
