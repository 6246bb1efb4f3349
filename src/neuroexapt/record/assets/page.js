/* Decisions, readings and the page itself. Part 3 of 3 of the report's script. */
"use strict";
/* ---- decisions ---- */
function choose(place) {
  const card = $("decision-" + place);
  if (!card) return;
  const box = document.querySelector('#filter input[value="' + DATA.decisions[place].outcome + '"]');
  if (box && !box.checked) box.click();
  card.open = true;
  card.classList.add("chosen");
  setTimeout(() => card.classList.remove("chosen"), 1600);
  const moment = DATA.drawing.moments.findIndex((m) => m.decision === place);
  if (moment >= 0) show(moment);
  card.scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block: "start" });
  card.querySelector("summary").focus({ preventScroll: true });
}

function setUpFilter() {
  const filter = $("filter");
  if (!filter) return;
  filter.hidden = false;
  filter.addEventListener("change", (event) => {
    document.querySelectorAll(".cards>." + event.target.value).forEach((card) => {
      card.hidden = !event.target.checked;
    });
  });
}

/* ---- readings ---- */
function drawReadings() {
  const signal = DATA.signals[Number($("signal").value)];
  const seen = signal.rows.flatMap((row) => row.values).filter((value) => value !== null);
  const low = seen.reduce((a, b) => Math.min(a, b)), high = seen.reduce((a, b) => Math.max(a, b));
  const table = make("table", "heat"), head = make("tr"), top = make("thead"), body = make("tbody");
  const unit = signal.unit ? " (" + signal.unit + ")" : "";
  const corner = make("th", "", signal.signal.replaceAll("_", " ") + unit);
  corner.scope = "col";
  head.append(corner);
  for (const [epoch, step] of signal.columns) {
    const cell = make("th", "num", epoch === null ? "step " + step : "epoch " + epoch);
    cell.scope = "col";
    head.append(cell);
  }
  for (const row of signal.rows) {
    const line = make("tr"), name = make("th", "", row.at);
    name.scope = "row";
    line.append(name);
    row.values.forEach((value, k) => {
      const cell = make("td", "num", value === null ? "" : digits(value, 3));
      if (value !== null) {
        const part = high > low ? (value - low) / (high - low) : 0.5;
        cell.style.setProperty("--part", Math.round(4 + 40 * part) + "%");
        const error = row.errors[k];
        cell.title = digits(value, 5) + (error === null ? "" : " \u00b1 " + digits(error, 2));
      }
      line.append(cell);
    });
    body.append(line);
  }
  top.append(head);
  table.append(top, body);
  $("grid").replaceChildren(table);
}

function setUpReadings() {
  if (!$("readings") || !DATA.signals.length) return;
  $("readings").hidden = false;
  DATA.signals.forEach((signal, k) => {
    const choice = make("option", "", signal.signal.replaceAll("_", " "));
    choice.value = k;
    $("signal").append(choice);
  });
  $("signal").addEventListener("change", drawReadings);
  drawReadings();
}

/* ---- light, dark, paper ---- */
function setUpTheme() {
  const button = make("button", "theme", "");
  button.type = "button";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => { button.textContent = now() === "dark" ? "Light colours" : "Dark colours"; };
  button.addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    name();
    redraw();
  });
  dark.addEventListener("change", () => { name(); redraw(); });
  name();
  document.querySelector("body>header").append(button);
  let before, closed = [];
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((part) => { part.open = true; });
    redraw();
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    closed.forEach((part) => { part.open = false; });
    redraw();
  });
}

root.classList.add("scripted");
setUpTheme();
setUpFilter();
setUpDrawing();
drawCharts();
setUpReadings();
