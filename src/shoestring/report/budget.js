"use strict";
// Shows the plan that a budget picks. Without it the page shows one, and all of them as a table.
(() => {
  const control = document.getElementById("control");
  const told = JSON.parse(control.dataset.told);
  const page = document.getElementById("page"), nothing = document.getElementById("nothing");
  const slider = document.getElementById("slider"), typed = document.getElementById("typed");
  const answer = document.getElementById("answer"), area = document.querySelector("#curve .area");
  const less = document.getElementById("less"), more = document.getElementById("more");
  const panels = [...document.querySelectorAll(".choice")];
  const rows = [...document.querySelectorAll(".plans tbody tr")];
  const recipes = [...document.querySelectorAll(".recipes tbody tr")];
  const units = { b: 1, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40,
    k: 1e3, kb: 1e3, m: 1e6, mb: 1e6, g: 1e9, gb: 1e9, t: 1e12, tb: 1e12 };
  let budget = told.budget;

  // The last plan that fits: peaks rise.
  const pick = (bytes) => told.peaks.filter((peak) => peak <= bytes).length - 1;
  const share = (value) => `${100 * Math.min(1, Math.max(0, value))}%`;
  const inUnit = (bytes) => (bytes / told.scale).toFixed(2);

  function set(bytes, from) {
    budget = bytes;
    const index = pick(bytes), plan = panels[index];
    panels.forEach((panel, i) => { panel.hidden = i !== index; });
    rows.forEach((row, i) => row.classList.toggle("mine", i === index));
    nothing.hidden = Boolean(plan);
    for (const row of recipes) {
      const fits = Number(row.dataset.peak) <= bytes, cell = row.lastElementChild;
      cell.textContent = fits ? "fits" : "too much";
      cell.className = fits ? "fits" : "over";
    }
    const [x, y] = plan ? told.places[index] : ["-100%", "-100%"];
    page.style.setProperty("--at", share((bytes - told.low) / (told.high - told.low)));
    page.style.setProperty("--up", share(bytes / told.top));
    page.style.setProperty("--x", x);
    page.style.setProperty("--y", y);
    document.querySelector(".here").hidden = !plan;
    if (from !== slider) slider.value = bytes;
    if (from !== typed) typed.value = inUnit(bytes);
    typed.removeAttribute("aria-invalid");
    const words = plan ? told.words[index] : "nothing fits";
    slider.setAttribute("aria-valuetext", `${inUnit(bytes)} ${told.unit}: ${words}`);
    answer.replaceChildren(strong(words));
    answer.classList.toggle("none", !plan);
    if (plan) {
      answer.append(`, peak ${inUnit(told.peaks[index])} ${told.unit}`);
      const left = Math.max(0, bytes - told.peaks[index]);
      plan.querySelector(".left").textContent =
        `${inUnit(left)} ${told.unit} of the budget is left`;
    }
    less.disabled = index <= 0;
    more.disabled = index >= told.peaks.length - 1;
  }

  function strong(text) {
    const made = document.createElement("b");
    made.textContent = text;
    return made;
  }

  // "6", "6 GiB" or "900MB"; a bare number is in the page's unit.
  function parse(text) {
    const found = /^\s*([0-9]*[.,]?[0-9]+|[0-9]+[.,])\s*([a-z]*)\s*$/i.exec(text);
    const unit = found && (found[2] ? units[found[2].toLowerCase()] : told.scale);
    const bytes = unit ? Number(found[1].replace(",", ".")) * unit : 0;
    return bytes > 0 ? bytes : null;
  }

  // A hair above, so that what is shown after rounding still fits.
  const exactly = (index) => told.peaks[index];

  slider.addEventListener("input", () => set(Number(slider.value), slider));
  typed.addEventListener("input", () => {
    const bytes = parse(typed.value);
    if (bytes === null) typed.setAttribute("aria-invalid", "true");
    else set(bytes, typed);
  });
  typed.addEventListener("change", () => { if (parse(typed.value) !== null) set(budget); });
  typed.addEventListener("focus", () => typed.select());
  less.addEventListener("click", () => set(exactly(Math.max(0, pick(budget) - 1))));
  more.addEventListener("click", () => set(exactly(pick(budget) + 1)));
  rows.forEach((row) => row.addEventListener("click", () => set(Number(row.dataset.peak))));
  area.addEventListener("click", (event) => {
    const box = area.getBoundingClientRect();
    const at = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    set(told.low + at * (told.high - told.low));
  });
  control.hidden = false;
  set(budget);
})();
