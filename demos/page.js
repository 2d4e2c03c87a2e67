"use strict";
// The page of a generation, recorded or live. What it shows lies in the element #recording; a live page is sent more of
// the same by its server. Nothing else is ever asked for.

// ---------------------------------------------------------------- what is shown

const recording = JSON.parse(document.getElementById("recording").textContent);
const { layers, cap, means } = recording;
const L = layers.length;
const tokens = [];
const $ = (id) => document.getElementById(id);

function numbers(base64, Kind) {
  const text = atob(base64);
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  return new Kind(bytes.buffer);
}

// Thresholds of every budget, layer by layer. Single precision, as the router compares.
const table = numbers(recording.table, Float32Array);

function unpacked(token) {
  const expert = numbers(token.expert, Int16Array);
  return {
    ...token,
    expert,
    level: numbers(token.level, Float32Array),
    weight: numbers(token.weight, Float32Array),
    threshold: numbers(token.threshold, Float32Array),
    probability: numbers(token.probability, Uint16Array),
    slots: expert.length / L,
    width: numbers(token.probability, Uint16Array).length / L,
  };
}

// ---------------------------------------------------------------- deciding

// The slots of one layer that are used under a threshold, best first: the inequality of routing/budget.py.
function decide(token, layer, threshold) {
  const used = [];
  for (let slot = layer * token.slots; slot < (layer + 1) * token.slots; slot++) {
    if (token.expert[slot] >= 0 && !(token.level[slot] > threshold)) used.push(slot);
  }
  return used;
}

// The place of the slider among the means, or null: as recorded.
let budget = null;

function threshold(token, layer) {
  return budget === null ? token.threshold[layer] : table[budget * L + layer];
}

function decision(token) {
  return layers.map((_, layer) => decide(token, layer, threshold(token, layer)));
}

function recorded(token) {
  return layers.map((_, layer) => decide(token, layer, token.threshold[layer]));
}

// The number a token is coloured by: over the layers whose number varies, or over all.
const counted = layers.flatMap((layer, place) => (layer.counted ? [place] : []));
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
const experts = (slots) => mean(counted.map((layer) => slots[layer].length));
const differ = (one, other) => one.length !== other.length || one.some((slot, place) => slot !== other[place]);

// For tests and for whoever asks in the console: the experts of every token and layer under a place among the means.
function decisions(place) {
  const before = budget;
  budget = place;
  const found = tokens.map((token) => decision(token).map((slots) => slots.map((slot) => token.expert[slot])));
  budget = before;
  return found;
}

// ---------------------------------------------------------------- the text

const text = $("text");
let line = null;
let word = null;
let chosen = 0;

// Bytes that make no whole character are never shown as one.
const visible = (piece) => piece.replaceAll("\ufffd", "");
const digits = (n) => (Math.abs(n - Math.round(n)) < 0.05 || n >= 9.95 ? n.toFixed(0) : n.toFixed(1));
const named = (n) => `${digits(n)} ${digits(n) === "1" ? "expert" : "experts"}`;
const WIDE = /[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef]/;

function element(name, className, content) {
  const made = document.createElement(name);
  made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

function newLine() {
  line = text.appendChild(element("div", "line"));
  word = null;
}

// A word stays whole; one that fills a line may be broken, and so may text that is written without spaces.
function placeFor(piece) {
  if (!line) newLine();
  const long = word && word.textContent.length > 28;
  if (!word || /^\s/.test(piece) || long || WIDE.test(piece)) word = line.appendChild(element("span", "word"));
  return word;
}

function prompt(words) {
  for (const [place, part] of words.split("\n").entries()) {
    if (place || !line) newLine();
    if (part) line.appendChild(element("span", "prompt", part));
  }
}

function addToken(packed) {
  const token = unpacked(packed);
  const place = tokens.push(token) - 1;
  const button = element("button", "token");
  button.type = "button";
  button.tabIndex = place === chosen ? 0 : -1;
  const piece = visible(token.text);
  const lines = piece.split("\n");
  const shown = piece === "" ? "\u25e6" : lines[0] + (lines.length > 1 ? "\u21b5" : "");
  button.append(element("span", piece === "" ? "piece none" : "piece", shown), element("span", "count"));
  placeFor(piece).append(button);
  token.button = button;
  token.recorded = recorded(token);
  // A line break ends the line behind the token that holds it; what stands behind it in the same token begins the next.
  lines.slice(1).forEach((rest) => {
    newLine();
    if (rest) {
      word = line.appendChild(element("span", "word"));
      const more = word.appendChild(element("span", "token rest"));
      more.append(element("span", "piece", rest));
      token.rest = [...(token.rest ?? []), more];
    }
  });
  button.addEventListener("pointerenter", () => showDetails(place));
  button.addEventListener("focus", () => choose(place, false));
  button.addEventListener("click", () => choose(place, true));
  paint(token);
  return place;
}

// Five colours from few experts to many, lightness rising or falling all the way in either theme; see page.css.
function paint(token) {
  const slots = decision(token);
  const n = experts(slots);
  const changed = budget !== null && slots.some((now, layer) => differ(now, token.recorded[layer]));
  const was = experts(token.recorded);
  const share = Math.min(n / cap, 1);
  for (const part of [token.button, ...(token.rest ?? [])]) {
    part.style.setProperty("--t", `${(200 * (share > 0.5 ? share - 0.5 : share)).toFixed(1)}%`);
    part.classList.toggle("many", share > 0.5);
    part.classList.toggle("changed", changed);
  }
  token.button.lastChild.textContent = digits(n);
  const by = counted.map((layer) => `layer ${layers[layer].index}: ${slots[layer].length}`).join(", ");
  const before = changed ? `, ${digits(was)} as recorded` : "";
  token.button.setAttribute("aria-label", `${JSON.stringify(visible(token.text))}: ${named(n)} (${by})${before}`);
}

// Looking at a token: by pointer as long as it is there, by keyboard or a click until another is chosen.
function choose(place, focus) {
  tokens[chosen]?.button.classList.remove("chosen");
  if (tokens[chosen]) tokens[chosen].button.tabIndex = -1;
  chosen = Math.min(Math.max(place, 0), tokens.length - 1);
  const { button } = tokens[chosen];
  button.tabIndex = 0;
  button.classList.add("chosen");
  if (focus) button.focus();
  showDetails(chosen);
}

const MOVES = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity };
text.addEventListener("keydown", (event) => {
  if (!(event.key in MOVES) || !tokens.length) return;
  event.preventDefault();
  choose(chosen + MOVES[event.key], true);
});
text.addEventListener("pointerleave", () => tokens.length && showDetails(chosen));

// ---------------------------------------------------------------- one token, layer by layer

const SVG = "http://www.w3.org/2000/svg";
const spectra = layers.map((layer) => {
  const row = $("layers").appendChild(element("div", "layer"));
  const head = row.appendChild(element("div", "layer-head"));
  const name = element("span", "layer-name", `layer ${layer.index} \u00b7 ${layer.letter}`);
  const number = element("span", "layer-number");
  head.append(name, number);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${layer.experts} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  row.append(svg);
  const bars = Array.from({ length: layer.experts }, (_, expert) => {
    const bar = document.createElementNS(SVG, "rect");
    bar.setAttribute("x", expert + 0.12);
    bar.setAttribute("width", 0.76);
    bar.append(document.createElementNS(SVG, "title"));
    return svg.appendChild(bar);
  });
  const best = row.appendChild(element("div", "best"));
  return { bars, number, best, svg };
});

function showDetails(place) {
  const token = tokens[place];
  if (!token) return;
  const slots = decision(token);
  $("token-name").textContent = visible(token.text).trim() === "" ? JSON.stringify(visible(token.text)) : visible(token.text).trim();
  const bits = token.nats / Math.LN2;
  $("token-facts").textContent =
    `token ${place + 1} of ${tokens.length}, ${named(experts(slots))}` +
    (budget === null ? "" : ` (${digits(experts(token.recorded))} as recorded)`) +
    `, ${bits.toFixed(1)} bits of surprise`;
  spectra.forEach((view, layer) => drawLayer(view, token, layer, slots[layer]));
}

function drawLayer({ bars, number, best, svg }, token, layer, slots) {
  const was = token.recorded[layer];
  const now = new Set(slots.map((slot) => token.expert[slot]));
  const before = new Set(was.map((slot) => token.expert[slot]));
  // Square roots of probabilities, in 65535ths.
  const roots = token.probability.subarray(layer * token.width, layer * token.width + layers[layer].experts);
  const most = Math.max(...roots, 1);
  bars.forEach((bar, expert) => {
    const height = Math.max((18 * roots[expert]) / most, 0.7);
    bar.setAttribute("y", 20 - height);
    bar.setAttribute("height", height);
    const [used, held] = [now.has(expert), before.has(expert)];
    bar.setAttribute("class", used ? (held ? "used" : "added") : held ? "dropped" : "idle");
    const share = (roots[expert] / 65535) ** 2;
    bar.firstChild.textContent = `expert ${expert}: probability ${(100 * share).toFixed(1)} %${used ? ", used" : ""}`;
  });
  const changes = [now.size - [...now].filter((e) => before.has(e)).length, [...before].filter((e) => !now.has(e)).length];
  const moved = changes[0] || changes[1] ? ` (+${changes[0]} \u2212${changes[1]})` : "";
  number.replaceChildren(`${now.size}`, element("span", "of", ` of ${layers[layer].experts}`), moved);
  const listed = (was.length ? was : slots).slice(0, 4).map((slot) => {
    const chip = element("span", now.has(token.expert[slot]) ? "chip" : "chip gone");
    chip.append(element("b", "", `#${token.expert[slot]}`), ` ${token.weight[slot].toFixed(2)}`);
    return chip;
  });
  best.replaceChildren(...listed, ...(was.length > 4 ? [element("span", "chip more", `and ${was.length - 4} more`)] : []));
  svg.setAttribute("aria-label", `layer ${layers[layer].index}: ${now.size} experts used, ${[...now].join(", ")}`);
}

// ---------------------------------------------------------------- the budget

const slider = $("budget");

function sums() {
  const all = tokens.map((token) => [decision(token), token.recorded]);
  return {
    all,
    now: mean(all.map(([slots]) => experts(slots))),
    before: mean(all.map(([, was]) => experts(was))),
    changed: all.filter(([slots, was]) => slots.some((one, layer) => differ(one, was[layer]))).length,
  };
}

function summarise() {
  const { all, now, before, changed } = sums();
  $("mean").textContent = tokens.length ? now.toFixed(2) : "\u2013";
  const bytes = new TextEncoder().encode(tokens.map((token) => token.text).join("")).length;
  const nats = tokens.reduce((sum, token) => sum + token.nats, 0);
  $("bits").textContent = bytes ? (nats / Math.LN2 / bytes).toFixed(2) : "\u2013";
  const times = tokens.slice(1).map((token) => token.seconds).sort((one, other) => one - other);
  $("ms").textContent = times.length ? (1000 * times[times.length >> 1]).toFixed(2) : "\u2013";
  const length = recording.prompt_tokens + tokens.length;
  $("cache").textContent = cacheSentence(length);
  if (slider) {
    $("budget-now").textContent = budgetText();
    slider.setAttribute("aria-valuetext", budgetText());
    if (!recording.live) {
      $("change").textContent =
        budget === null
          ? `As recorded: ${before.toFixed(2)} experts per token. Move the slider to decide again from the stored scores.`
          : `${changed} of ${tokens.length} tokens would change; the mean of this text goes from ${before.toFixed(2)} to ${now.toFixed(2)} experts.`;
    }
  }
  layers.forEach((_, layer) => {
    const one = mean(all.map(([slots]) => slots[layer].length));
    const was = mean(all.map(([, slots]) => slots[layer].length));
    const moved = all.filter(([slots, old]) => differ(slots[layer], old[layer])).length;
    const cells = $("by-layer").rows[layer].cells;
    cells[1].textContent = tokens.length ? was.toFixed(2) : "";
    cells[2].textContent = budget === null ? "" : one.toFixed(2);
    cells[3].textContent = budget === null ? "" : `${moved}`;
    cells[4].firstChild.style.setProperty("--t", `${100 * Math.min((budget === null ? was : one) / cap, 1)}%`);
  });
}

const SIZES = recording.cache;
function cacheSentence(length) {
  const place = Math.min(length, SIZES.model.length) - 1;
  if (place < 0) return "\u2013";
  const [own, full] = [SIZES.model[place], SIZES.full[place]];
  return `${own.toLocaleString("en")} of ${full.toLocaleString("en")}`;
}

function budgetText() {
  if (recording.live) return liveBudget === null ? "as trained" : `${named(liveBudget)} per token`;
  return budget === null ? "as recorded" : `${named(means[budget])} per token`;
}

function setBudget(place) {
  budget = place;
  tokens.forEach(paint);
  summarise();
  if (tokens.length) showDetails(chosen);
}

layers.forEach((layer) => {
  const row = $("by-layer").insertRow();
  row.append(element("th", "", `${layer.index} \u00b7 ${layer.letter}`));
  for (let cell = 0; cell < 3; cell++) row.insertCell();
  row.insertCell().append(element("span", "meter"));
});

let liveBudget = recording.budget;
document.body.classList.toggle("live", recording.live);
if (slider && !recording.live) {
  slider.addEventListener("input", () => setBudget(Number(slider.value)));
  $("as-recorded").addEventListener("click", () => {
    slider.value = slider.defaultValue;
    setBudget(null);
  });
}
if (recording.prompt) prompt(recording.prompt);
recording.tokens.forEach(addToken);
if (recording.end) end(recording.end);
summarise();
if (tokens.length) showDetails(0);

function end(reason) {
  const said = { document: "end of the document", length: "the number of tokens asked for", stop: "stopped here" };
  text.append(element("p", "end", said[reason] ?? reason));
}
