// Plots: drawn by plotly from the page's own data, in the page's own colours.

const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const NUM_COLOURS = 10;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (variant) => css(`--c${variant % NUM_COLOURS}`);
const symbol = (variant) => SYMBOLS[Math.floor(variant / NUM_COLOURS) % SYMBOLS.length];
const dash = (variant) => DASHES[Math.floor(variant / NUM_COLOURS) % DASHES.length];

// Labels are a user's text, and plotly reads some tags.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, most) => plain(text.length > most ? `${text.slice(0, most - 1)}…` : text);
const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

function layout(more) {
  const axis = { gridcolor: css("--hair"), linecolor: css("--line"), zeroline: false, ticks: "outside", tickcolor: css("--line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 10, r: 14, t: 8, b: 40 },
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif", size: 12.5, color: css("--ink") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    showlegend: false, hovermode: "closest", ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false, showTips: false };

function draw(id, traces, more) {
  const place = $(id);
  place.style.height = more.height ? `${more.height}px` : "";
  if (!traces.length) {
    Plotly.purge(place);
    place.replaceChildren(element("p", { class: "empty", text: "Nothing to show: no run that is chosen has this figure." }));
    return;
  }
  if (!place.classList.contains("js-plotly-plot")) place.replaceChildren();
  Plotly.react(place, traces, layout(more), CONFIG);
}

function arrow(tag) {
  return tag.direction === "lower" ? "lower is better" : tag.direction === "higher" ? "higher is better" : "";
}

function drawDots(tag, shown, runsShown) {
  const rows = tag.rows.filter((row) => shown.has(row.variant) && row.mean !== null).reverse();
  const names = rows.map((row) => content.variants[row.variant].label);
  const colours = rows.map((row) => colour(row.variant));
  const at = new Map(rows.map((row, i) => [row.variant, i]));
  const runs = runsShown.filter((run) => at.has(run.variant) && Number.isFinite(run.metrics[tag.tag] ?? NaN) && run.metrics[tag.tag] !== null);
  const traces = rows.map((row, i) => ({
    type: "scatter", mode: "lines+markers", x: [row.low, row.high], y: [i, i], hoverinfo: "skip",
    line: { color: colours[i], width: 3 }, marker: { symbol: "line-ns", size: 8, line: { color: colours[i], width: 2 } }, visible: row.low !== null,
  }));
  traces.push({
    type: "scatter", mode: "markers", x: runs.map((r) => r.metrics[tag.tag]), y: runs.map((r) => at.get(r.variant) - 0.24),
    text: runs.map((r) => `${plain(r.name)}, seed ${r.seed}`), hovertemplate: "%{text}<br>%{x:.5g}<extra></extra>",
    marker: { size: 7, color: "rgba(0,0,0,0)", line: { width: 1.4, color: runs.map((r) => colour(r.variant)) } },
  });
  traces.push({
    type: "scatter", mode: "markers", x: rows.map((r) => r.mean), y: rows.map((_, i) => i),
    text: rows.map((r, i) => `<b>${plain(names[i])}</b><br>mean ${figure(r.mean)}, n = ${r.n}` + (r.low === null ? "" : `<br>${figure(r.low)} to ${figure(r.high)}`)),
    hovertemplate: "%{text}<extra></extra>", marker: { size: 10, color: colours, symbol: rows.map((r) => symbol(r.variant)) },
  });
  const shapes = tag.real === null ? [] : [{ type: "line", x0: tag.real, x1: tag.real, yref: "paper", y0: 0, y1: 1, line: { color: css("--soft"), width: 1.2, dash: "dash" } }];
  draw("dots", rows.length ? traces : [], {
    height: Math.max(340, 26 * rows.length + 90), shapes,
    xaxis: { title: { text: plain(tag.tag) + (arrow(tag) && ` (${arrow(tag)})`) } },
    yaxis: { tickvals: rows.map((_, i) => i), ticktext: names.map((name) => cut(name, 30)), range: [-0.7, rows.length - 0.3], ticks: "" },
  });
}

const COSTS = { train_seconds: "training time (s)", flops: "training FLOPs", parameters: "parameters", peak_memory_gb: "peak memory (GiB)", steps: "steps" };

function drawCompute(tag, shown) {
  const cost = $("cost").value;
  const rows = tag.rows.filter((row) => shown.has(row.variant) && row.mean !== null && (content.variants[row.variant].costs[cost] ?? null) !== null);
  const points = rows.map((row) => ({ row, x: content.variants[row.variant].costs[cost], y: row.mean }));
  const traces = [];
  if (tag.direction && points.length > 1) {
    // The front: nothing cheaper is better.
    const front = [];
    for (const p of [...points].sort((a, b) => a.x - b.x || (tag.direction === "lower" ? a.y - b.y : b.y - a.y))) {
      const best = front[front.length - 1];
      if (!best || (tag.direction === "lower" ? p.y < best.y : p.y > best.y)) front.push(p);
    }
    traces.push({ type: "scatter", mode: "lines", x: front.map((p) => p.x), y: front.map((p) => p.y), line: { color: css("--soft"), width: 1.2, dash: "dot", shape: "hv" }, hoverinfo: "skip" });
  }
  for (const p of points) {
    const name = content.variants[p.row.variant].label;
    const range = p.row.low === null ? undefined : { type: "data", symmetric: false, array: [p.row.high - p.y], arrayminus: [p.y - p.row.low], color: colour(p.row.variant), thickness: 1.4, width: 4 };
    traces.push({
      type: "scatter", mode: points.length > 10 ? "markers" : "markers+text", x: [p.x], y: [p.y], error_y: range, text: [cut(name, 22)], textposition: "top center",
      textfont: { size: 11, color: css("--soft") }, cliponaxis: false,
      hovertemplate: `<b>${plain(name)}</b><br>${figure(p.y)}<br>${large(p.x)}<extra></extra>`, marker: { size: 10, color: colour(p.row.variant), symbol: symbol(p.row.variant) },
    });
  }
  const log = $("cost-log").checked;
  const more = log ? { type: "log" } : { type: "linear" };
  draw("compute", points.length ? traces : [], {
    height: 380, xaxis: { title: { text: COSTS[cost] ?? cost }, exponentformat: "SI", ...more }, yaxis: { title: { text: plain(tag.tag) + (arrow(tag) && `<br>${arrow(tag)}`) } },
  });
}

function meanCurve(curve, runs) {
  const out = { x: [], y: [], low: [], high: [], n: [] };
  curve.steps.forEach((step, i) => {
    const values = runs.map((r) => curve.runs[r][i]).filter((v) => v !== null);
    if (!values.length) return;
    const mean = values.reduce((a, b) => a + b) / values.length;
    const spread = values.length > 1 ? Math.sqrt(values.reduce((s, v) => s + (v - mean) ** 2, 0) / (values.length - 1)) : 0;
    out.x.push(step); out.y.push(mean); out.low.push(mean - spread); out.high.push(mean + spread); out.n.push(values.length);
  });
  return out;
}

function drawCurves(tag, shown, runsShown) {
  const curve = content.curves[$("curve").value];
  const order = tag ? tag.rows.map((row) => row.variant) : [];
  const variants = [...order, ...content.variants.keys()].filter((v, i, all) => all.indexOf(v) === i && shown.has(v));
  const byVariant = new Map(variants.map((v) => [v, []]));
  for (const run of runsShown) if (curve.runs[run.id]) byVariant.get(run.variant)?.push(run.id);
  const having = variants.filter((v) => byVariant.get(v).length);
  const most = Number($("curve-most").value) || having.length;
  const chosen = having.slice(0, most);
  const bands = [], lines = [];
  for (const v of chosen) {
    const mean = meanCurve(curve, byVariant.get(v)), name = content.variants[v].label, of = { legendgroup: `v${v}` };
    const fill = faded(colour(v), 0.14);
    if (mean.n.some((n) => n > 1)) {
      bands.push({ ...of, type: "scatter", mode: "lines", x: [...mean.x, ...[...mean.x].reverse()], y: [...mean.high, ...[...mean.low].reverse()], fill: "toself", fillcolor: fill, line: { width: 0 }, hoverinfo: "skip", showlegend: false });
    }
    if ($("curve-seeds").checked) {
      for (const r of byVariant.get(v)) lines.push({ ...of, type: "scatter", mode: "lines", x: curve.steps, y: curve.runs[r], connectgaps: true, line: { color: colour(v), width: 0.8, dash: dash(v) }, opacity: 0.6, hoverinfo: "skip", showlegend: false });
    }
    lines.push({ ...of, type: "scatter", mode: mean.x.length < 12 ? "lines+markers" : "lines", name: cut(name, 34), x: mean.x, y: mean.y, customdata: mean.n, line: { color: colour(v), width: 2.2, dash: dash(v) }, marker: { symbol: symbol(v), size: 6 }, hovertemplate: `<b>${plain(name)}</b><br>step %{x}: %{y:.5g} (n = %{customdata})<extra></extra>` });
  }
  const left = having.length - chosen.length;
  $("curve-note").textContent = "Line: mean over seeds. Band: one standard deviation either way." +
    (curve.bin > 1 ? ` A point is the mean over ${curve.bin} steps.` : "") + (left ? ` ${left} lower-ranked variants are not drawn.` : "");
  draw("curves", lines.length ? [...bands, ...lines] : [], {
    height: 430, showlegend: true, legend: { orientation: "h", y: -0.16, x: 0, font: { size: 12 } },
    xaxis: { title: { text: "step", standoff: 6 } }, yaxis: { title: { text: plain($("curve").value) }, type: $("curve-log").checked ? "log" : "linear" },
  });
}
