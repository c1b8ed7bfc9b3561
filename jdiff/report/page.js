"use strict";
// Samples: a thumbnail shows its picture large.
const large = document.getElementById("large");
for (const button of document.querySelectorAll(".strip button")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll(".strip button")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    large.src = button.querySelector("img").src;
    large.alt = button.querySelector("img").alt;
    document.getElementById("step").textContent = button.dataset.step;
  });
}
const strip = document.querySelector(".strip");
if (strip) strip.scrollLeft = strip.scrollWidth;

// Charts: the pointer reads the nearest point.
for (const chart of document.querySelectorAll(".chart")) {
  const points = JSON.parse(chart.dataset.points);
  const output = chart.parentElement.querySelector("output");
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  dot.setAttribute("class", "pointer");
  dot.setAttribute("r", "5");
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(chart.getScreenCTM().inverse()).x;
    let best = points[0];
    for (const point of points) {
      if (Math.abs(point[0] - at) < Math.abs(best[0] - at)) best = point;
    }
    dot.setAttribute("cx", best[0]);
    dot.setAttribute("cy", best[1]);
    chart.append(dot);
    output.textContent = `step ${best[2].toLocaleString("en")}: ${best[3]}`;
  });
  chart.addEventListener("pointerleave", () => { dot.remove(); output.textContent = ""; });
}
