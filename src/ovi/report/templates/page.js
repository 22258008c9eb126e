// The page: what is chosen above decides what tables, plots and player show.

content.runs.forEach((run, id) => { run.id = id; });

const filter = {
  settings: {},
  tag() { return content.tags.find((tag) => tag.tag === $("metric").value); },
  fits(run) {
    const words = $("text").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const variant = content.variants[run.variant];
    const name = `${variant.label} ${run.name}`.toLowerCase();
    return words.every((word) => name.includes(word)) && (!$("seed").value || String(run.seed) === $("seed").value) &&
      (!$("status").value || run.status === $("status").value) &&
      Object.entries(this.settings).every(([key, select]) => !select.value || variant.values[key] === select.value);
  },
  // Best first, then by seed.
  runs() {
    const place = new Map((this.tag()?.rows ?? []).map((row, i) => [row.variant, i]));
    const of = (run) => place.get(run.variant) ?? content.variants.length + run.variant;
    return content.runs.filter((run) => this.fits(run)).sort((a, b) => of(a) - of(b) || (b.status === "finished") - (a.status === "finished") || a.seed - b.seed);
  },
};

const HEADS = [["#", "rank"], ["variant", "label"], ["n", "n"], ["mean", "mean"], ["std", "std"], ["interval low", "low"], ["high", "high"], ["coverage", "coverage"], ["clips", "clips"], ["missing", "lacking"], ["steps", "steps"], ["train s", "train_seconds"], ["FLOPs", "flops"], ["parameters", "parameters"], ["peak GiB", "peak_memory_gb"]];
const WORDS = { low: "Lower end of the interval of the mean over seeds", high: "Upper end of the interval of the mean over seeds", coverage: "Share of clips the figure rests on", clips: "Generated clips measured in a run", lacking: "Finished runs without the figure: left out of the mean", n: "Runs (seeds) with the figure", train_seconds: "Training without validation" };

function drawRanking(tag, shown) {
  const table = $("ranking"), sorted = [...(table.tHead.rows[0]?.cells ?? [])].findIndex((cell) => cell.getAttribute("aria-sort") !== "none");
  const descending = sorted >= 0 && table.tHead.rows[0].cells[sorted].getAttribute("aria-sort") === "descending";
  if (!table.tHead.rows.length) {
    table.tHead.append(element("tr", {}, ...HEADS.map(([name, key]) => element("th", { scope: "col", "aria-sort": "none", class: key === "label" ? "" : "number" }, element("button", { type: "button", text: name, title: WORDS[key] })))));
  }
  const rows = (tag?.rows ?? []).map((row, i) => {
    const variant = content.variants[row.variant], costs = variant.costs;
    const best = tag.direction && i === 0 && row.mean !== null;
    const number = (value, text, more = "") => element("td", { class: `number ${more}`, "data-value": value ?? "", text: value === null || value === undefined ? "" : text });
    const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = `var(--c${row.variant % NUM_COLOURS})`;
    const line = element("tr", { class: best ? "best" : "" },
      number(row.mean === null ? null : i + 1, i + 1, "dim"), element("th", { scope: "row" }, swatch, variant.label), number(row.n, row.n),
      number(row.mean, figure(row.mean), "mean"), number(row.std, figure(row.std, 3)), number(row.low, figure(row.low)), number(row.high, figure(row.high)),
      number(row.coverage, row.coverage === null ? "" : `${(100 * row.coverage).toFixed(0)} %`), number(row.clips, whole(row.clips)),
      number(row.lacking, row.lacking || "", row.lacking ? "failed" : "dim"), number(costs.steps, whole(costs.steps)), number(costs.train_seconds, figure(costs.train_seconds, 3)),
      number(costs.flops, large(costs.flops)), number(costs.parameters, large(costs.parameters)), number(costs.peak_memory_gb, figure(costs.peak_memory_gb, 3)));
    if (row.mean === null) line.cells[3].append(element("span", { class: "chip stopped", text: "missing" }));
    line.dataset.variant = row.variant;
    line.hidden = !shown.has(row.variant);
    return line;
  });
  table.tBodies[0].replaceChildren(...rows);
  // A column that says nothing here takes no room.
  const few = HEADS.map(([, key], i) => !["rank", "label", "n", "mean", "std"].includes(key) && rows.every((row) => !row.cells[i].textContent.trim()));
  [table.tHead.rows[0], ...rows].forEach((row) => few.forEach((empty, i) => { row.cells[i].hidden = empty; }));
  if (sorted >= 0) sortRows(table, sorted, descending);
  else if (rows.length) sortRows(table, 0, false);
}

function notes(tag) {
  if (!tag) {
    $("metric-note").textContent = content.runs.some((run) => run.status === "finished") ? "No finished run has a figure to rank by." : "No run has finished yet: there is nothing to rank.";
    return;
  }
  const words = [tag.direction ? `${tag.direction === "lower" ? "Lower" : "Higher"} is better.` : "No direction is declared for this figure: it is ordered by value, and none is called best."];
  if (tag.real !== null) words.push(`Real clips: ${figure(tag.real)} (dashed in the plot, where it is in range).`);
  if (tag.coverage) words.push("Coverage is the share of clips the figure rests on: compare means only where it is alike.");
  $("metric-note").textContent = words.join(" ");
  const few = tag.rows.some((row) => row.n > 0 && row.n < 3), missing = tag.rows.reduce((sum, row) => sum + row.lacking, 0), without = content.variants.length - tag.rows.length;
  $("ranking-note").textContent = [
    tag.intervals.length ? `The interval is that of the mean over trainings (seeds), at 95 %: ${tag.intervals.join(" or ")}.` : "", few ? "With fewer than 3 seeds a mean says little." : "",
    without ? `${without} ${without === 1 ? "variant has" : "variants have"} no finished run: see the table of runs.` : "",
    missing ? `${missing} finished ${missing === 1 ? "run lacks" : "runs lack"} this figure and ${missing === 1 ? "is" : "are"} left out of the means.` : "",
    $("seed").value || $("status").value ? "Means are over all finished seeds; the choice of seed and status acts on single runs, curves and samples." : "",
  ].filter(Boolean).join(" ");
}

let player = null;

function update() {
  const runs = filter.runs(), shown = new Set(runs.map((run) => run.variant)), tag = filter.tag();
  drawRanking(tag, shown);
  notes(tag);
  const ids = new Set(runs.map((run) => String(run.id)));
  document.querySelectorAll("#runs tbody tr").forEach((row) => { row.hidden = !ids.has(row.dataset.run); });
  document.querySelectorAll(".map").forEach((map) => { map.hidden = !shown.has(content.runs[map.dataset.run].variant); });
  $("count").textContent = `${runs.length} of ${content.runs.length} runs`;
  drawPlots(runs, shown, tag);
  player?.show();
}

function drawPlots(runs, shown, tag) {
  if (tag) { drawDots(tag, shown, runs.filter((run) => run.status === "finished")); drawCompute(tag, shown); } else { draw("dots", [], {}); draw("compute", [], {}); }
  if ($("curves")) drawCurves(tag, shown, runs);
}

function replot() {
  const runs = filter.runs();
  drawPlots(runs, new Set(runs.map((run) => run.variant)), filter.tag());
}

function fill() {
  const known = element("optgroup", { label: "with a direction" }), other = element("optgroup", { label: "others" });
  for (const tag of content.tags) (tag.direction ? known : other).append(option(tag.tag, tag.tag + (tag.direction ? (tag.direction === "lower" ? " ↓" : " ↑") : ""), tag.tag === content.main));
  $("metric").append(...[known, other].filter((group) => group.children.length));
  for (const seed of [...new Set(content.runs.map((run) => run.seed))].sort((a, b) => a - b)) $("seed").append(option(seed, seed));
  for (const status of [...new Set(content.runs.map((run) => run.status))]) $("status").append(option(status, status));
  for (const key of Object.keys(content.variants[0]?.values ?? {})) {
    const select = element("select", {}, option("", "all"), ...[...new Set(content.variants.map((variant) => variant.values[key]))].map((value) => option(value, value)));
    filter.settings[key] = select;
    $("settings").append(element("label", { title: key }, `${key.split(/[./]/).pop()} `, select));
    select.addEventListener("change", update);
  }
  for (const [key, name] of Object.entries(COSTS)) if (content.variants.some((variant) => (variant.costs[key] ?? null) !== null)) $("cost").append(option(key, name));
  if (!$("curves")) return;
  const preferred = [content.main, "val/loss", "train/loss"].find((tag) => content.curves[tag]);
  for (const tag of Object.keys(content.curves)) $("curve").append(option(tag, tag, tag === preferred));
  const count = content.variants.length;
  for (const most of [4, 8, 16]) if (most < count) $("curve-most").append(option(most, `best ${most}`, most === 8));
  $("curve-most").append(option("", `all ${count}`, count <= 8));
}

fill();
if (content.prompts.length) player = new Player(filter);
for (const id of ["metric", "seed", "status"]) $(id).addEventListener("change", update);
let typed = 0;
$("text").addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(update, 150); });
$("clear").addEventListener("click", () => {
  for (const id of ["text", "seed", "status"]) $(id).value = "";
  Object.values(filter.settings).forEach((select) => { select.value = ""; });
  update();
});
for (const id of ["cost", "cost-log", "curve", "curve-most", "curve-seeds", "curve-log"]) $(id)?.addEventListener("change", replot);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", replot);
addEventListener("beforeprint", replot);
addEventListener("afterprint", replot);
update();
