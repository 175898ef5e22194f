"use strict";
// Tells the values under a pointer. Everything can be read without it.
for (const area of document.querySelectorAll("[data-points]")) {
  const told = JSON.parse(area.dataset.points);
  if (!told.rows.length) continue;
  const cursor = element(area, "div", "cursor");
  const tip = element(area, "div", "tip");
  cursor.hidden = tip.hidden = true;

  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = told.low + share * (told.high - told.low);
    const at = told.xs[told.rows[0].x][nearest(told.xs[told.rows[0].x], wanted)];
    tip.replaceChildren();
    const head = element(tip, "div", "head");
    element(head, "span").textContent = phase(told, at) || told.x;
    element(head, "b").textContent = at.toLocaleString("en");
    let sum = 0;
    for (const row of [...told.rows].reverse()) {
      const xs = told.xs[row.x], index = nearest(xs, wanted), value = row.y[index];
      const away = Math.abs(xs[index] - wanted) / (told.high - told.low) * box.width;
      if (value === null || (row.sparse && away > 14)) continue;
      line(tip, row, value, told);
      sum += value;
    }
    if (told.phases.length) line(tip, { name: "in all" }, sum, told);
    cursor.hidden = tip.hidden = false;
    const x = (at - told.low) / (told.high - told.low) * box.width;
    cursor.style.left = `${x}px`;
    const beside = x < box.width / 2 ? x + 12 : x - 12 - tip.offsetWidth;
    tip.style.left = `${Math.min(box.width - tip.offsetWidth, Math.max(0, beside))}px`;
  });
  for (const gone of ["pointerleave", "pointercancel"]) {
    area.addEventListener(gone, () => { cursor.hidden = tip.hidden = true; });
  }
}

function element(parent, name, kind) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  return parent.appendChild(made);
}

function line(tip, row, value, told) {
  const made = element(tip, "div");
  const name = element(made, "span");
  if (row.colour) element(name, "i", "swatch").style.background = `var(${row.colour})`;
  name.append(row.name);
  const isStacked = told.phases.length > 0;
  const digits = isStacked
    ? { minimumFractionDigits: 2, maximumFractionDigits: 2 } : { maximumSignificantDigits: 5 };
  const text = value.toLocaleString("en", digits);
  element(made, "b").textContent = isStacked ? `${text} ${told.unit}` : text;
}

function phase(told, at) {
  let name = "";
  for (const [each, start] of told.phases) if (start <= at) name = each;
  return name;
}

function nearest(xs, wanted) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= wanted) low = middle; else high = middle;
  }
  return wanted - xs[low] <= xs[high] - wanted ? low : high;
}
