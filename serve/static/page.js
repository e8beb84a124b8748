// The page: asks the service's own API and draws what it answers. No library, no other host.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const state = { run: "", front: null, low: null, high: null, plan: null, asked: 0, job: 0 };

// ---- asking -----------------------------------------------------------------------------------

async function api(path, options = {}) {
  const body = options.body && JSON.stringify(options.body);
  const headers = { ...(body && { "Content-Type": "application/json" }), ...options.headers };
  const answer = await fetch(path, { ...options, body, headers });
  if (answer.ok) return answer;
  const document_ = await answer.json().catch(() => null);
  throw new Error(document_?.error?.message ?? `the service answered ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield data.map((line) => line.slice(6)).join("\n");
    }
  }
}

const strategies = async (requests) =>
  (await (await api("v1/strategies", { method: "POST", body: { model: state.run, requests } })).json()).data;

// ---- the slider -------------------------------------------------------------------------------

const target = () => document.querySelector("input[name=target]:checked").value;
const share = () => Number($("slider").value) / 1000;

function request() {
  const kind = target();
  if (kind === "sparsity") return { sparsity: Number((share() * state.high.sparsity).toFixed(4)) };
  if (kind === "max_params") {
    const { kept_params: least } = state.high, { total_params: most } = state.low;
    return { max_params: Math.round(most - share() * (most - least)) };
  }
  return { max_kl: Number(klAt(share()).toPrecision(3)) };
}

function klAt(part) {
  const worst = state.front.predicted.at(-1).kl.hi95, best = worst / 3000;
  return best * (worst / best) ** part;
}

const NAMES = {
  sparsity: "Fraction of weights dropped",
  max_params: "Weights kept at most",
  max_kl: "KL at most, nats per token",
};

function shown(asked) {
  if ("sparsity" in asked) return percent(asked.sparsity);
  return "max_params" in asked ? count(asked.max_params) : asked.max_kl.toPrecision(3);
}

let timer = 0;
function moved() {
  const asked = request();
  $("target-name").textContent = NAMES[target()];
  $("target-value").textContent = shown(asked);
  clearTimeout(timer);
  timer = setTimeout(() => plan(asked), 25);
}

async function plan(asked) {
  const turn = ++state.asked;
  try {
    const [answer] = await strategies([asked]);
    if (turn !== state.asked) return; // a later answer is under way
    $("note").textContent = "";
    state.plan = answer;
    describe(answer);
  } catch (error) {
    if (turn === state.asked) $("note").textContent = error.message;
  }
}

function describe(answer) {
  const { mean, lo95, hi95 } = answer.predicted.kl;
  $("kl").textContent = small(mean);
  $("kl-interval").textContent = `nats per token, 95% between ${small(lo95)} and ${small(hi95)}`;
  $("sparsity").textContent = percent(answer.sparsity);
  $("kept").textContent = `${count(answer.kept_params)} of ${count(answer.total_params)}`;
  $("bytes").textContent = bytes(answer.bytes);
  $("served").textContent = answer.served_as === "mask" ? "mask (zeros in place)" : answer.served_as;
  const suggestion = "v-" + shown(answer.request).toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  if (!$("suffix").dataset.own) $("suffix").value = suggestion;
  drawPoint(answer);
  drawStrategy(answer);
}

const percent = (part) => `${(100 * part).toFixed(1)} %`;
const small = (value) => (value === 0 ? "0" : value < 0.001 ? value.toExponential(1) : value.toPrecision(3));
function scaled(value, units, base) {
  let step = 0;
  for (; value >= base && step < units.length - 1; step++) value /= base;
  return `${value >= 100 || step === 0 ? Math.round(value) : value.toPrecision(3)}${units[step]}`;
}
const count = (value) => scaled(value, ["", "k", "M", "B", "T"], 1000);
const bytes = (value) => scaled(value, [" B", " kB", " MB", " GB", " TB"], 1000);

// ---- pictures ---------------------------------------------------------------------------------

function add(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

const BOX = { left: 58, right: 14, top: 10, bottom: 42, width: 640, height: 360 };
let scale = null;

function drawFront() {
  const svg = $("front");
  svg.replaceChildren();
  const predicted = state.front.predicted;
  const worst = predicted.at(-1).kl.hi95, floor = worst / 5000;
  const most = state.high.sparsity;
  scale = {
    x: (s) => BOX.left + (s / most) * (BOX.width - BOX.left - BOX.right),
    y: (kl) => {
      const part = Math.log(Math.max(kl, floor / 100) / floor) / Math.log((worst * 1.5) / floor);
      return BOX.height - BOX.bottom - Math.min(part, 1) * (BOX.height - BOX.top - BOX.bottom);
    },
  };
  for (let exponent = Math.ceil(Math.log10(floor)); 10 ** exponent < worst * 1.5; exponent++) {
    const y = scale.y(10 ** exponent);
    add(svg, "line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right, y1: y, y2: y });
    add(svg, "text", { x: BOX.left - 8, y: y + 4, "text-anchor": "end" }, String(10 ** exponent));
  }
  for (let s = 0; s <= most + 1e-9; s += 0.1) {
    add(svg, "line", { class: "grid", x1: scale.x(s), x2: scale.x(s), y1: BOX.top, y2: BOX.height - BOX.bottom });
    add(svg, "text", { x: scale.x(s), y: BOX.height - BOX.bottom + 18, "text-anchor": "middle" }, `${Math.round(100 * s)} %`);
  }
  add(svg, "text", { x: (BOX.left + BOX.width) / 2, y: BOX.height - 4, "text-anchor": "middle" }, "sparsity over prunable sites");
  add(svg, "text", { x: -(BOX.height - BOX.bottom) / 2, y: 13, transform: "rotate(-90)", "text-anchor": "middle" }, "KL, nats per token");
  const clip = add(svg, "clipPath", { id: "inside" }); // what lies below the floor is cut off
  add(clip, "rect", { x: BOX.left, y: 0, width: BOX.width - BOX.left, height: BOX.height - BOX.bottom });
  const inside = add(svg, "g", { "clip-path": "url(#inside)" });
  const upper = predicted.map((p) => [p.sparsity, p.kl.hi95]);
  const lower = predicted.map((p) => [p.sparsity, p.kl.lo95]).reverse();
  add(inside, "polygon", { class: "band", points: points([...upper, ...lower]) });
  for (const name of ["uniform", "fisher"]) {
    add(inside, "polyline", { class: name, points: points(state.front.measured_on_validation[name] ?? []) });
  }
  add(inside, "polyline", { class: "curve", points: points(predicted.map((p) => [p.sparsity, p.kl.mean])) });
  add(svg, "g", { id: "point" });
  drawLegend();
}

const points = (pairs) =>
  pairs.map(([s, kl]) => `${scale.x(s).toFixed(1)},${scale.y(kl).toFixed(1)}`).join(" ");

function drawLegend() {
  const entries = [["curve", "StratNet, predicted"], ["band", "95% interval"], ["uniform", "uniform, measured"], ["fisher", "Fisher allocation, measured"]];
  $("legend").replaceChildren(...entries.map(([name, text]) => {
    const item = document.createElement("li");
    const svg = add(item, "svg", { viewBox: "0 0 26 10" });
    if (name === "band") add(svg, "rect", { class: name, width: 26, height: 10 });
    else add(svg, "line", { class: name, x1: 0, x2: 26, y1: 5, y2: 5 });
    item.append(text);
    return item;
  }));
}

function drawPoint(answer) {
  const group = $("point"), x = scale.x(answer.sparsity), { mean, lo95, hi95 } = answer.predicted.kl;
  const bottom = BOX.height - BOX.bottom, y = (kl) => Math.min(scale.y(kl), bottom);
  group.replaceChildren();
  add(group, "line", { class: "dense-line", x1: x, x2: x, y1: y(hi95), y2: y(lo95) });
  const dot = add(group, "circle", { class: "dot", cx: x, cy: y(mean), r: 7 });
  add(dot, "title", {}, `${percent(answer.sparsity)}: KL ${small(mean)}`);
}

// One row per kind of site, one column per block; a strategy over whole blocks is one row.
function grid(settings) {
  const cells = Object.entries(settings).map(([axis, value]) => {
    const path = axis.slice(axis.indexOf("/") + 1).split(".");
    const at = path.findIndex((part) => /^\d+$/.test(part));
    const kind = path.slice(at + 1).join(".") || axis.slice(0, axis.indexOf("/"));
    return { axis, value, block: at < 0 ? 0 : Number(path[at]), kind };
  });
  const kinds = [...new Set(cells.map((cell) => cell.kind))];
  return { cells, kinds, blocks: 1 + Math.max(...cells.map((cell) => cell.block)) };
}

function drawStrategy(answer) {
  const svg = $("strategy"), { cells, kinds, blocks } = grid(answer.strategy.settings);
  const left = 130, width = 1150, row = 26, column = (width - left) / blocks;
  svg.setAttribute("viewBox", `0 0 ${width} ${kinds.length * row + 24}`);
  svg.replaceChildren();
  kinds.forEach((kind, y) => add(svg, "text", { x: left - 8, y: y * row + 18, "text-anchor": "end" }, kind));
  const step = Math.ceil(blocks / 40);
  for (let b = 0; b < blocks; b += step) {
    add(svg, "text", { x: left + (b + 0.5) * column, y: kinds.length * row + 18, "text-anchor": "middle" }, step === 1 && blocks < 17 ? `block ${b}` : String(b));
  }
  for (const cell of cells) {
    const y = kinds.indexOf(cell.kind) * row, x = left + cell.block * column;
    const rect = add(svg, "rect", { class: "cell", x, y, width: column, height: row, rx: 3, fill: shade(cell.value) });
    rect.dataset.site = `${cell.axis.slice(cell.axis.indexOf("/") + 1)}: ${percent(cell.value)} dropped`;
    if (column > 46) {
      add(svg, "text", { x: x + column / 2, y: y + 17.5, "text-anchor": "middle", class: cell.value > 0.5 ? "on-dark" : "on-light" }, Math.round(100 * cell.value));
    }
  }
}

function shade(part) { // white through blue to ink: told apart in grey, too
  const stops = [[240, 246, 253], [94, 163, 224], [12, 44, 92]];
  const at = Math.min(Math.max(part, 0), 1) * 2, from = stops[Math.min(Math.floor(at), 1)], to = stops[Math.min(Math.floor(at), 1) + 1];
  const mix = at - Math.min(Math.floor(at), 1);
  return `rgb(${from.map((c, i) => Math.round(c + mix * (to[i] - c))).join(",")})`;
}

// ---- jobs -------------------------------------------------------------------------------------

async function make(event) {
  event.preventDefault();
  const turn = ++state.job, suffix = $("suffix").value;
  $("make-button").disabled = true;
  try {
    const body = { model: state.run, request: state.plan.request, suffix };
    const job = await (await api("v1/compression/jobs", { method: "POST", body })).json();
    $("job").hidden = false;
    $("note").textContent = "";
    await follow(job, turn);
  } catch (error) {
    $("note").textContent = error.message;
  } finally {
    $("make-button").disabled = false;
  }
}

async function follow(job, turn) {
  const path = `v1/compression/jobs/${encodeURIComponent(job.id)}`;
  tell(`${job.compressed_model}: queued`, 0);
  const stream = await api(`${path}/events`, { headers: { Accept: "text/event-stream" } });
  for await (const data of events(stream)) {
    if (turn !== state.job) return;
    const { type, data: news } = JSON.parse(data);
    if (type === "progress") tell(`${job.compressed_model}: ${news.stage}`, news.total ? (news.done + 0.5) / (news.total + 1) : 0.5);
    else tell(`${job.compressed_model}: ${type}`, type === "succeeded" ? 1 : 0.1);
  }
  const end = await (await api(path)).json();
  if (end.status !== "succeeded") throw new Error(end.error?.message ?? `the job was ${end.status}`);
  delete $("suffix").dataset.own;
  await listVariants(job.compressed_model);
}

function tell(text, part) {
  $("job-text").textContent = text;
  $("job-progress").value = part;
}

// ---- talking ----------------------------------------------------------------------------------

async function listVariants(chosen) {
  const { data } = await (await api("v1/models")).json();
  const mine = data.filter((model) => model.kind === "variant" && model.run === state.run);
  $("variant").replaceChildren(...mine.map(({ id }) => new Option(id.slice(id.indexOf(":") + 1), id)));
  if (chosen) $("variant").value = chosen;
  $("talk-button").disabled = mine.length === 0;
  $("talk-button").title = mine.length === 0 ? "make a variant first" : "";
}

async function talk(event) {
  event.preventDefault();
  const variant = $("variant").value;
  $("dense-name").textContent = state.run;
  $("variant-name").textContent = variant;
  $("talk-button").disabled = true;
  await Promise.all([complete(state.run, $("dense")), complete(variant, $("pruned"))]);
  $("talk-button").disabled = false;
}

async function complete(model, place) {
  const prompt = $("prompt").value, asked = document.createElement("span");
  asked.className = "asked";
  asked.textContent = prompt;
  const said = document.createElement("span");
  place.replaceChildren(asked, said);
  place.dataset.state = "busy";
  try {
    const body = { model, prompt, max_tokens: Number($("tokens").value), temperature: 0, stream: true };
    for await (const data of events(await api("v1/completions", { method: "POST", body }))) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      said.textContent += chunk.choices[0]?.text ?? "";
    }
    place.dataset.state = "done";
  } catch (error) {
    said.className = "trouble";
    said.textContent = `\n${error.message}`;
    place.dataset.state = "failed";
  }
}

// ---- beginning --------------------------------------------------------------------------------

async function open() {
  state.run = $("run").value;
  try {
    state.front = await (await api(`v1/front?model=${encodeURIComponent(state.run)}`)).json();
    const most = state.front.predicted.at(-1).sparsity;
    [state.low, state.high] = await strategies([{ sparsity: 0 }, { sparsity: most }]);
    drawFront();
    moved();
    await listVariants();
  } catch (error) {
    $("note").textContent = error.message;
  }
}

$("run").addEventListener("change", open);
$("slider").addEventListener("input", moved);
for (const input of document.querySelectorAll("input[name=target]")) input.addEventListener("change", moved);
$("suffix").addEventListener("input", () => { $("suffix").dataset.own = "yes"; });
$("make").addEventListener("submit", make);
$("talk").addEventListener("submit", talk);
$("strategy").addEventListener("pointerover", (event) => {
  if (event.target.dataset.site) $("site").textContent = event.target.dataset.site;
});
open();
