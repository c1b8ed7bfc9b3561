"use strict";
// The table: a heading sorts by its column, settings by their mean; what has no figure comes last.
const table = document.getElementById("points");
const bodies = [...table.tBodies];
const all = [...table.querySelectorAll("tr.point")];
const home = new Map(all.map((row) => [row, row.parentElement]));
const flat = document.createElement("tbody");
let view = "settings";

function key(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const value = Number(text);
  return Number.isNaN(value) ? text : value;
}

function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", {numeric: true});
}

function arrange() {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.hasAttribute("aria-sort"));
  const sign = column >= 0 && heads[column].getAttribute("aria-sort") === "descending" ? -1 : 1;
  const sorted = (rows) => column < 0 ? rows
    : [...rows].sort((a, b) => compare(key(a, column), key(b, column), sign));
  table.classList.toggle("flat", view === "points");
  for (const body of bodies) body.remove();
  flat.remove();
  if (view === "points") {
    for (const row of all) {
      row.style.setProperty("--own", home.get(row).style.getPropertyValue("--own"));
    }
    flat.replaceChildren(...sorted(all));
    table.append(flat);
    return;
  }
  for (const row of all) home.get(row).append(row);
  for (const body of bodies) {
    body.append(...sorted([...body.querySelectorAll("tr.point")]));
  }
  const leads = sorted(bodies.map((body) => body.rows[0]));
  table.append(...leads.map((row) => row.parentElement));
}

for (const head of table.tHead.rows[0].cells) {
  head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.better === "higher" ? "descending" : "ascending";
    const before = head.getAttribute("aria-sort");
    const next = !before ? first : before === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", next);
    arrange();
  });
}
for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".views button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    view = button.dataset.view;
    arrange();
  });
}

// Loss curves: the pointer reads the nearest one; a row of the table shows its own.
function light(name) {
  for (const chart of document.querySelectorAll(".overlay")) {
    chart.classList.toggle("dim", name !== null);
    for (const curve of chart.querySelectorAll(".curve")) {
      curve.classList.toggle("lit", curve.dataset.point === name);
    }
  }
  for (const row of all) row.classList.toggle("lit", row.dataset.point === name);
}
for (const row of all) {
  row.addEventListener("pointerenter", () => light(row.dataset.point));
  row.addEventListener("pointerleave", () => light(null));
}
for (const chart of document.querySelectorAll(".overlay")) {
  const curves = JSON.parse(chart.dataset.curves);
  const output = chart.parentElement.querySelector("output");
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  dot.setAttribute("class", "pointer");
  dot.setAttribute("r", "5");
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(chart.getScreenCTM().inverse());
    let best = null, least = Infinity;
    for (const [name, points] of curves) {
      for (const point of points) {
        const far = Math.hypot(point[0] - at.x, point[1] - at.y);
        if (far < least) [best, least] = [[name, point], far];
      }
    }
    const [name, point] = best;
    dot.setAttribute("cx", point[0]);
    dot.setAttribute("cy", point[1]);
    chart.append(dot);
    output.textContent = `${name}, step ${point[2].toLocaleString("en")}: ${point[3]}`;
    light(name);
  });
  chart.addEventListener("pointerleave", () => {
    dot.remove();
    output.textContent = "";
    light(null);
  });
}
