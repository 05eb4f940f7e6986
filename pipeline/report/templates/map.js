"use strict";
// The map of the features: hover or arrow keys show a picture, the legend singles a label out.
(() => {
  const holder = document.getElementById("map-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const plot = document.getElementById("plot");
  const svg = plot.querySelector("svg");
  const ring = document.getElementById("ring");
  const tip = document.getElementById("tip");
  const marks = [...svg.querySelectorAll("[data-point]")];
  const centre = marks.map((mark) => [Number(mark.dataset.x), Number(mark.dataset.y)]);
  const shown = new Map([...document.querySelectorAll("img[data-row]")].map((img) => [Number(img.dataset.row), img.src]));
  let chosen = -1;
  let only = null;

  const hidden = (index) => only !== null && data.points[index].series !== only;

  function line(text, kind) {
    const span = document.createElement("span");
    span.textContent = text;
    if (kind) span.className = kind;
    tip.append(span);
  }

  function place(index) {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const [x, y] = [centre[index][0] * scale, centre[index][1] * scale];
    const left = x + 16 + tip.offsetWidth > box.width ? x - 16 - tip.offsetWidth : x + 16;
    const top = Math.min(Math.max(0, y - tip.offsetHeight / 2), Math.max(0, box.height - tip.offsetHeight));
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${top}px`;
  }

  function choose(index) {
    if (index === chosen) return;
    chosen = index;
    const none = index < 0;
    ring.setAttribute("display", none ? "none" : "inline");
    tip.hidden = none;
    if (none) return;
    const point = data.points[index];
    ring.setAttribute("cx", centre[index][0]);
    ring.setAttribute("cy", centre[index][1]);
    tip.replaceChildren();
    const source = shown.get(point.row) || data.thumbnails[point.row];
    if (source) {
      const img = document.createElement("img");
      img.src = source;
      img.alt = "";
      tip.append(img);
    }
    if (point.label !== null) line(point.score === null ? point.label : `${point.label} · ${point.score.toFixed(3)}`);
    line(point.name, "soft");
    place(index);
  }

  function nearest(x, y, limit) {
    let best = -1;
    let least = limit * limit;
    centre.forEach(([px, py], index) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least && !hidden(index)) [best, least] = [index, distance];
    });
    return best;
  }

  // The closest point in the quadrant that an arrow key names.
  function step(dx, dy) {
    if (chosen < 0) return nearest(svg.viewBox.baseVal.width / 2, svg.viewBox.baseVal.height / 2, Infinity);
    const [x, y] = centre[chosen];
    let best = chosen;
    let least = Infinity;
    centre.forEach(([px, py], index) => {
      const along = (px - x) * dx + (py - y) * dy;
      const across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (index !== chosen && along > 0 && across <= along && !hidden(index) && along + across < least) {
        [best, least] = [index, along + across];
      }
    });
    return best;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    choose(nearest((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, 14 * Math.max(1, scale)));
  });
  svg.addEventListener("pointerleave", () => choose(-1));
  svg.addEventListener("blur", () => choose(-1));
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") choose(-1);
    if (!way) return;
    event.preventDefault();
    choose(step(...way));
  });

  for (const button of document.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      const series = Number(button.dataset.series);
      only = only === series ? null : series;
      for (const other of document.querySelectorAll("[data-series]")) {
        other.setAttribute("aria-pressed", String(Number(other.dataset.series) === only));
      }
      marks.forEach((mark, index) => mark.classList.toggle("dim", hidden(index)));
      choose(-1);
    });
  }
})();
