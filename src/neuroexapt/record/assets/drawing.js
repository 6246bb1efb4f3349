/* The architecture at any moment of the run. Part 2 of 3 of the report's script. */
"use strict";
let at = Math.max(0, DATA.drawing.moments.length - 1);
let rows = [];

function upTo(versions, moment) {
  let low = 0, high = versions.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (versions[middle][0] <= moment) low = middle + 1; else high = middle;
  }
  return low ? versions[low - 1].slice(1) : [];
}

function shapeOf(now, was) {
  const cell = make("span", "dims");
  const sizes = now.split("x"), old = (was || "").split("x");
  const plain = /^\d+(x\d+)*$/;
  const same = was && plain.test(was) && old.length === sizes.length;
  if (!plain.test(now)) { cell.textContent = now; return cell; }
  sizes.forEach((size, k) => {
    if (k) cell.append(" \u00d7 ");
    if (same && old[k] !== size) cell.append(make("b", "", old[k] + "\u2192" + size));
    else cell.append(size);
  });
  return cell;
}

function rowOf(node, now, was, most) {
  const gone = !now.length;
  const status = gone ? "removed" : !was.length ? "added"
    : now.join() === was.join() ? "unchanged" : "changed";
  const shown = gone ? was : now;
  const row = make("li", "node " + status + (node.joint ? " joint" : ""));
  const sign = make("span", "sign " + status, SIGNS[status]);
  if (status === "unchanged") sign.setAttribute("aria-hidden", "true");
  else sign.setAttribute("role", "img"), sign.setAttribute("aria-label", status);
  const size = shown[2];
  const cost = make("span", "size");
  if (size !== null) {
    cost.append(make("span", "", digits(size, 6)));
    const bar = make("span", "bar");
    bar.style.width = Math.max(1, 100 * Math.sqrt(size / most)) + "%";
    cost.append(bar);
  }
  const name = node.joint ? "" : node.name || "(model)";
  row.append(sign, make("span", "kind", shown[0]), make("span", "name", name),
    shown[1] ? shapeOf(shown[1], status === "changed" ? was[1] : "") : make("span", "dims"), cost);
  return { row, status };
}

function show(moment) {
  const { moments, nodes } = DATA.drawing;
  if (!moments.length) return;
  at = Math.min(Math.max(moment, 0), moments.length - 1);
  const since = $("base").value === "before" ? Math.max(0, at - 1) : 0;
  const only = $("only").checked, list = make("ol", "nodes");
  const versions = nodes.map((node) => [upTo(node.versions, at), upTo(node.versions, since)]);
  const most = versions.reduce((a, [now]) => Math.max(a, now[2] || 0), 1);
  rows = [];
  const counts = { added: 0, changed: 0, removed: 0, unchanged: 0 };
  nodes.forEach((node, place) => {
    const [now, was] = versions[place];
    if (!now.length && !was.length) return;
    const { row, status } = rowOf(node, now, was, most);
    if (!node.joint) counts[status] += 1;
    if (only && status === "unchanged") return;
    list.append(row);
    rows.push({ place, row, reads: upTo(node.reads, now.length ? at : since)[0] || [] });
  });
  if (!rows.length) list.append(make("li", "node soft", "no layer differs"));
  $("net").style.removeProperty("--gutter");
  $("net").replaceChildren(list);
  tell(moments[at], counts);
  drawWires();
  drawCursor();
}

function tell(moment, counts) {
  const told = $("told"), range = $("moment");
  const size = moment.parameters === null ? "" : ", " + digits(moment.parameters, 6) + " parameters";
  const step = moment.step === null ? "" : " (step " + digits(moment.step, 6) + ")";
  const words = (at + 1) + " of " + DATA.drawing.moments.length + ": " + moment.label + step + size;
  told.replaceChildren(make("strong", "", words + ". "));
  const seen = ["added", "changed", "removed"].filter((word) => counts[word]);
  told.append("Layers: " + (seen.map((word) => counts[word] + " " + word).join(", ") || "no change") + ". ");
  if (moment.decision !== null) {
    const link = make("a", "", "Why?");
    link.href = "#decision-" + moment.decision;
    const place = moment.decision;
    link.addEventListener("click", (event) => { event.preventDefault(); choose(place); });
    told.append(link);
  }
  range.value = at;
  range.setAttribute("aria-valuetext", words);
  $("earlier").disabled = at === 0;
  $("later").disabled = at === DATA.drawing.moments.length - 1;
}

/* Which reads which: short lines between neighbours, one lane for whatever else a layer feeds. */
function drawWires() {
  const list = document.querySelector("#net ol");
  if (!list || $("only").checked || !rows.some((row) => row.reads.length)) return;
  const where = new Map(rows.map((row, k) => [row.place, k]));
  const far = new Map(), near = [];
  rows.forEach(({ reads }, k) => reads.forEach((place) => {
    const from = where.get(place);
    if (from === undefined) return;
    if (from === k - 1) near.push([from, k]);
    else far.set(from, [...(far.get(from) || []), k]);
  }));
  const spans = [...far].map(([from, to]) => ({
    from, to, low: Math.min(from, ...to), high: Math.max(from, ...to),
  })).sort((a, b) => (a.high - a.low) - (b.high - b.low));
  const used = [];
  for (const span of spans) {
    span.lane = used.findIndex((taken) => taken.every((s) => s.high <= span.low || s.low >= span.high));
    if (span.lane < 0) span.lane = used.length < MOST_LANES ? used.push([]) - 1 : MOST_LANES - 1;
    used[span.lane].push(span);
  }
  const dot = 12 + 11 * used.length, space = "http://www.w3.org/2000/svg";
  $("net").style.setProperty("--gutter", dot + 14 + "px");
  const svg = document.createElementNS(space, "svg");
  const draw = (tag, given) => {
    const shape = document.createElementNS(space, tag);
    for (const key in given) shape.setAttribute(key, given[key]);
    svg.append(shape);
  };
  const y = rows.map(({ row }) => row.offsetTop + row.offsetHeight / 2);
  for (const [from, to] of near) draw("path", { d: `M${dot} ${y[from]}V${y[to]}` });
  for (const { from, to, lane } of spans) {
    const x = dot - 11 * (lane + 1);
    for (const end of to) {
      const turn = end > from ? 6 : -6;
      draw("path", {
        d: `M${dot} ${y[from]}H${x + 6}Q${x} ${y[from]} ${x} ${y[from] + turn}`
          + `V${y[end] - turn}Q${x} ${y[end]} ${x + 6} ${y[end]}H${dot}`,
        class: end > from ? "" : "back",
      });
    }
  }
  rows.forEach(({ row }, k) => {
    const kind = row.classList.contains("joint") ? 3 : 4.5;
    draw("circle", { cx: dot, cy: y[k], r: kind, class: row.classList[1] });
  });
  svg.setAttribute("class", "wires");
  svg.setAttribute("width", dot + 8);
  svg.setAttribute("height", list.offsetTop + list.offsetHeight);
  svg.setAttribute("aria-hidden", "true");
  const old = $("net").querySelector("svg");
  if (old) old.remove();
  $("net").prepend(svg);
}

function setUpDrawing() {
  if (!$("evolution") || !DATA.drawing.moments.length) return;
  $("evolution").hidden = false;
  const range = $("moment");
  range.max = DATA.drawing.moments.length - 1;
  range.addEventListener("input", () => show(Number(range.value)));
  $("earlier").addEventListener("click", () => show(at - 1));
  $("later").addEventListener("click", () => show(at + 1));
  $("base").addEventListener("change", () => show(at));
  $("only").addEventListener("change", () => show(at));
  show(at);
}
