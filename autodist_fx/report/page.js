"use strict";
// Tables that are sorted by a click on a header, and searched. Without this script the page only lacks both.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener("click", () => sortBy(header, column));
  });

  function sortBy(header, column) {
    // up, down, and back to the order of the plan
    const next = { ascending: "descending", descending: null }[header.getAttribute("aria-sort")];
    const order = next === undefined ? "ascending" : next;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    if (order) header.setAttribute("aria-sort", order);
    const rows = order ? [...original].sort((a, b) => compare(a.cells[column], b.cells[column])) : original;
    if (order === "descending") rows.reverse();
    body.append(...rows);
  }
}

function compare(a, b) {
  const [x, y] = [a, b].map((cell) => cell.dataset.v ?? cell.textContent);
  const [m, n] = [Number(x), Number(y)];
  return Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y, "en", { numeric: true }) : m - n;
}

// A search for "layers.3.mlp" finds the row "layers.*.mlp", if layer 3 is among the row's.
for (const input of document.querySelectorAll("input[data-search]")) {
  const rows = [...document.getElementById(input.dataset.search).tBodies[0].rows];
  const found = input.closest(".search").querySelector("output");
  input.closest(".search").hidden = false;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().replaceAll("x", "×").split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => matches(row, word));
      count += row.hidden ? 0 : 1;
    }
    found.textContent = words.length ? `${count} of ${rows.length} rows` : "";
  });
}

function matches(row, word) {
  // not in drawings, nor in what a linear is not
  const cells = [...row.cells].filter((cell) => !cell.matches(".wide, .aside"));
  row.text ??= cells.map((cell) => cell.textContent).join(" ").toLowerCase().replaceAll("x", "×");
  if (row.text.includes(word)) return true;
  const number = /(?<=^|\.)\d+(?=\.|$)/.exec(word);
  return (
    number !== null &&
    row.text.includes(word.replace(/(?<=^|\.)\d+(?=\.|$)/g, "*")) &&
    (row.dataset.layers ?? "").split(",").some((range) => {
      const [first, last] = range.split("-").map(Number);
      return first <= number[0] && number[0] <= (last ?? first);
    })
  );
}
