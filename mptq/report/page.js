"use strict";
// Clicking a column header sorts the table; clicking again reverses the order. Cells without a value stay last.
const key = (row, column, numeric) => {
  const cell = row.cells[column];
  if ("none" in cell.dataset) return null;
  return numeric ? Number(cell.dataset.value ?? cell.textContent) : cell.textContent;
};
const sort = (table, column) => {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column];
  const numeric = head.classList.contains("number");
  const first = numeric ? "descending" : "ascending";
  const turned = { ascending: "descending", descending: "ascending" };
  const order = turned[head.getAttribute("aria-sort")] ?? first;
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...table.tBodies[0].rows].map((row) => [key(row, column, numeric), row]);
  rows.sort(([left], [right]) => {
    if (left === null || right === null) return (left === null) - (right === null);
    return sign * (numeric ? left - right : left.localeCompare(right, "en", { numeric: true }));
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
  heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
};
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, column));
  });
}
