"use strict";
const rows = [...document.querySelectorAll("#samples tbody tr")];
const field = (name) => document.getElementById(name);
const filters = ["text", "run", "kind", "first", "last", "least"].map(field);
function show() {
  const [text, run, kind, first, last, least] = filters.map((x) => x.value);
  let count = 0;
  for (const row of rows) {
    const data = row.dataset;
    const shown =
      (!text || (row.cells[4].textContent + row.cells[5].textContent).toLowerCase().includes(text.toLowerCase())) &&
      (!run || data.run === run) &&
      (!kind || data.kind === kind) &&
      (!first || Number(data.update) >= Number(first)) &&
      (!last || Number(data.update) <= Number(last)) &&
      (!least || (data.score !== "" && Number(data.score) >= Number(least)));
    row.hidden = !shown;
    count += shown;
  }
  field("count").textContent = `${count} of ${rows.length} samples`;
}
filters.forEach((x) => x.addEventListener("input", show));
show();
