/* Charts over optimizer steps, with the mutations marked. Part 1 of 3 of the report's script.
   All numbers and texts come from the element #data. Text is only ever set as text. */
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["solid", [7, 4], [2, 4], [9, 3, 2, 3]];
const SHAPES = { kept: "circle", rolled_back: "rect", refused: "triangle", pending: "diamond" };
const SIGNS = { added: "+", removed: "\u2212", changed: "\u2260", unchanged: "" };
const WORDS = { kept: "kept", rolled_back: "rolled back", refused: "refused", pending: "no verdict yet" };
const LANE = 13, LANES = 4, MOST_DOTS = 60, MOST_LANES = 9;
const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
const still = matchMedia("(prefers-reduced-motion: reduce)");

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined && text !== null) element.textContent = text;
  return element;
}

/* ---- numbers in words ---- */
function digits(value, most) {
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toPrecision(most);
  return value.toLocaleString("en-US", { maximumSignificantDigits: most });
}
function short(value) {
  for (const [size, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return Number((value / size).toPrecision(4)) + prefix;
  }
  return String(Number(value.toPrecision(4)));
}
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
function scaleOf(chart) {
  if (chart.unit === "%") return [100, "%"];
  if (chart.unit !== "B") return [1, ""];
  const values = chart.lines.flatMap((line) => line.points.map((point) => point[1] || 0));
  let most = values.reduce((a, b) => Math.max(a, b), 0), power = 0;
  while (most >= 1024 && power < UNITS.length - 1) { most /= 1024; power += 1; }
  return [1 / 1024 ** power, " " + UNITS[power]];
}

/* ---- charts ---- */
const plots = [];
const marked = DATA.decisions.map((d, place) => ({ ...d, place })).filter((d) => d.step !== null)
  .sort((a, b) => a.step - b.step);

function range(chart) {
  let low = Infinity, high = -Infinity;
  const see = (step) => { low = Math.min(low, step); high = Math.max(high, step); };
  for (const line of chart.lines) for (const point of line.points) see(point[0]);
  for (const mark of marked) see(mark.step);
  return high > low ? [low, high] : [low - 1, high + 1];
}

/* A row for each mark's shape, so that neighbours do not cover each other. */
function lanes(ends, width) {
  const taken = new Array(LANES).fill(-Infinity);
  return marked.map((mark) => {
    const x = (mark.step - ends[0]) / (ends[1] - ends[0]) * width;
    let lane = taken.findIndex((end) => x - end > LANE);
    if (lane < 0) lane = taken.indexOf(Math.min(...taken));
    taken[lane] = x;
    return lane;
  });
}

function drawnLine(chart, line, factor) {
  const points = line.points.map((p) => [p[0], p[1] === null ? null : p[1] * factor]);
  const lone = points.map((p, k) => p[1] !== null && (points[k - 1] || [0, null])[1] === null
    && (points[k + 1] || [0, null])[1] === null);
  const few = points.length <= MOST_DOTS;
  const paint = colour("l" + line.rank % 4);
  return {
    type: "line", name: line.name, data: points, step: chart.stepped ? "end" : false, z: 4,
    symbol: "circle", symbolSize: (_, at) => (few || lone[at.dataIndex] ? 5 : 0),
    sampling: points.length > 4000 ? "lttb" : undefined, silent: true, emphasis: { disabled: true },
    lineStyle: { width: 2.2, color: paint, type: DASHES[line.rank % 4] }, itemStyle: { color: paint },
  };
}

function band(line, factor, rank) {
  if (!line.points.some((p) => p[2] !== undefined)) return [];
  const known = (p) => p[1] !== null && p[2] !== undefined;
  const quiet = {
    type: "line", stack: "band" + rank, stackStrategy: "all", symbol: "none", silent: true,
    lineStyle: { opacity: 0 }, emphasis: { disabled: true }, z: 1,
  };
  const low = line.points.map((p) => [p[0], known(p) ? (p[1] - p[2]) * factor : null]);
  const more = line.points.map((p) => [p[0], known(p) ? 2 * p[2] * factor : null]);
  const area = { color: colour("l" + line.rank % 4), opacity: 0.16 };
  return [{ ...quiet, data: low }, { ...quiet, data: more, areaStyle: area }];
}

function marks(ends, box) {
  const inner = Math.max(60, box.clientWidth - 72), rows = lanes(ends, inner);
  const height = box.clientHeight - 48;
  // Where marks are dense they must not hide the curves.
  const faint = Math.min(1, Math.max(0.07, inner / marked.length / 10));
  const data = marked.map((mark, k) => ({
    value: [mark.step, 1 - (rows[k] * LANE + 7) / height], symbol: SHAPES[mark.outcome],
    symbolSize: faint < 0.6 ? 7 : 11, decision: mark.place,
    itemStyle: { color: colour(mark.outcome), borderColor: colour("paper"), borderWidth: 1, opacity: 1 },
  }));
  const style = { kept: "solid", rolled_back: [5, 3], refused: [1.5, 3], pending: [1, 6] };
  const lines = marked.map((mark) => ({
    xAxis: mark.step,
    lineStyle: { color: colour(mark.outcome), type: style[mark.outcome], width: 1.2, opacity: 0.6 * faint },
  }));
  return {
    id: "marks", type: "scatter", yAxisIndex: 1, z: 6, data, cursor: "pointer",
    markLine: { silent: true, symbol: "none", label: { show: false }, data: lines, z: 2 },
  };
}

function tip(chart, factor, unit, ends, box) {
  return (found) => {
    const at = (Array.isArray(found) ? found[0] : found).axisValue;
    const body = make("div", "tip");
    body.append(make("strong", "", "step " + digits(Math.round(at), 6)));
    for (const line of chart.lines) {
      let best = null;
      for (const p of line.points) {
        if (p[1] !== null && (!best || Math.abs(p[0] - at) <= Math.abs(best[0] - at))) best = p;
      }
      if (!best) continue;
      const error = best[2] === undefined ? "" : " \u00b1 " + digits(best[2] * factor, 2);
      body.append(make("div", "", line.name + ": " + digits(best[1] * factor, 4) + error + unit
        + " (step " + digits(best[0], 6) + ")"));
    }
    const near = (ends[1] - ends[0]) / Math.max(1, box.clientWidth - 72) * 8;
    const close = marked.filter((mark) => Math.abs(mark.step - at) <= near);
    for (const mark of close.slice(0, 5)) {
      body.append(make("div", "badge " + mark.outcome, mark.label + ": " + WORDS[mark.outcome]));
    }
    if (close.length > 5) body.append(make("div", "soft", "and " + (close.length - 5) + " more"));
    return body;
  };
}

function option(chart, box) {
  const [factor, unit] = scaleOf(chart), ends = range(chart);
  const axis = { color: colour("soft"), fontSize: 12, hideOverlap: true };
  const room = marked.length ? 8 + LANE * (1 + Math.max(...lanes(ends, box.clientWidth - 72))) : 8;
  const head = room / Math.max(1, box.clientHeight - 48);
  const y = {
    type: "value", scale: !chart.stepped, splitNumber: 5, axisPointer: { show: false },
    // Room on top for the shapes of the marks.
    max: (seen) => seen.max + (seen.max - (chart.stepped ? 0 : seen.min) || 1) * (head + 0.05),
    axisLabel: { ...axis, showMaxLabel: false, formatter: (v) => short(v) + unit },
    splitLine: { lineStyle: { color: colour("grid") } },
  };
  if (chart.stepped) y.min = 0;
  return {
    animation: false, aria: { enabled: false }, grid: { left: 58, right: 14, top: 8, bottom: 40 },
    textStyle: { fontFamily: "inherit" },
    xAxis: {
      type: "value", min: ends[0], max: ends[1], name: "optimizer step", nameLocation: "middle",
      nameGap: 25, nameTextStyle: { ...axis }, axisLabel: { ...axis, formatter: short },
      splitLine: { show: false }, axisLine: { show: true, lineStyle: { color: colour("soft") } },
    },
    yAxis: [y, { type: "value", min: 0, max: 1, show: false, axisPointer: { show: false } }],
    tooltip: {
      trigger: "axis", confine: true, backgroundColor: colour("paper"), borderColor: colour("rule"),
      textStyle: { color: colour("ink"), fontSize: 13 }, formatter: tip(chart, factor, unit, ends, box),
      axisPointer: { type: "line", lineStyle: { color: colour("soft") } },
    },
    series: [
      ...chart.lines.flatMap((line, rank) => band(line, factor, rank)),
      ...[...chart.lines].reverse().map((line) => drawnLine(chart, line, factor)),
      marks(ends, box),
    ],
  };
}

/* The moment of the slider, in every chart: a line above it, so that no chart is drawn anew. */
function drawCursor() {
  const { moments } = DATA.drawing, moment = moments[at];
  for (const { plot, box, line } of plots) {
    line.hidden = moments.length < 2 || moment.step === null;
    if (line.hidden) continue;
    if (line.parentNode !== box) box.append(line);
    line.style.left = plot.convertToPixel({ xAxisIndex: 0 }, moment.step) + "px";
  }
}

function redraw() {
  for (const { chart, plot, box } of plots) {
    plot.setOption(option(chart, box), true);
    const svg = box.querySelector("svg");
    // On paper the drawing is as wide as the page, not as the window was.
    if (svg) svg.setAttribute("viewBox", "0 0 " + box.clientWidth + " " + box.clientHeight);
  }
  drawCursor();
}

function drawCharts() {
  DATA.charts.forEach((chart, place) => {
    const box = $("plot-" + place);
    const plot = echarts.init(box, null, { renderer: "svg" });
    plot.on("click", (event) => {
      if (event.seriesId === "marks") choose(event.data.decision);
    });
    plots.push({ chart, plot, box, line: make("div", "cursor") });
  });
  redraw();
  let waiting = 0;
  const watched = [...plots.map(({ box }) => box), ...($("net") ? [$("net")] : [])];
  const wide = () => watched.reduce((sum, box) => sum + box.clientWidth, 0);
  let width = wide();
  const resized = new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      // The first call only says how large everything is.
      if (wide() === width) return;
      width = wide();
      for (const { plot } of plots) plot.resize();
      redraw();
      drawWires();
    });
  });
  for (const box of watched) resized.observe(box);
}
