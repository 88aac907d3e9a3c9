// Looks at the page that it is put into, and leaves what it found as JSON in an element of its own.
const found = { errors: window.pageErrors, overlaps: [], spills: [], outside: [] };

// Visible boxes of every piece of text: what is left of its lines inside of all that clips or scrolls.
function textBoxes() {
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, .skip")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      let box = { left: rect.left, top: rect.top, right: rect.right, bottom: rect.bottom };
      for (let e = parent; e && e !== document.body; e = e.parentElement) {
        if (getComputedStyle(e).overflowX === "visible") continue;
        const r = e.getBoundingClientRect();
        box = { left: Math.max(box.left, r.left), top: Math.max(box.top, r.top),
                right: Math.min(box.right, r.right), bottom: Math.min(box.bottom, r.bottom) };
      }
      if (box.right - box.left > 1 && box.bottom - box.top > 1) boxes.push({ ...box, text: node.data.trim().slice(0, 40) });
    }
  }
  return boxes;
}

function overlap(a, b) {
  return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
}

function look() {
  const boxes = textBoxes();
  boxes.sort((a, b) => a.top - b.top);
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j].top < a.bottom; j++)
      if (overlap(a, boxes[j])) found.overlaps.push([a.text, boxes[j].text]);
  });
  found.texts = boxes.length;
  // text that is wider than the small box which was drawn for it
  for (const e of document.querySelectorAll(".badge, .rank, .lane i, .bar.whole span, .arrow, .tiles dd, .axis span"))
    if (e.scrollWidth > e.clientWidth + 1) found.spills.push(`${e.className}: ${e.textContent.slice(0, 40)}`);
  // pieces of bars outside of their bar
  for (const e of document.querySelectorAll(".lane i, .track rect, .stack i")) {
    const [r, p] = [e, e.parentElement].map((x) => x.getBoundingClientRect());
    if (r.left < p.left - 1 || r.right > p.right + 1) found.outside.push(e.title || e.textContent);
  }
}

// Once all that the page may have asked the network for has come, or not.
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  look();
  found.scrolls = document.documentElement.scrollWidth - innerWidth; // sideways, the whole page
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.unreachable = [...document.querySelectorAll(".scroll, .pipeline")]
    .filter((e) => e.scrollWidth > e.clientWidth && e.tabIndex < 0).length;

  const table = document.getElementById("linears-table");
  if (table) {
    const shown = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
    const input = document.querySelector("input[data-search]");
    found.searches = {};
    for (const words of ["", ...SEARCHES]) {
      input.value = words;
      input.dispatchEvent(new Event("input"));
      found.searches[words] = shown();
    }
    input.value = "";
    input.dispatchEvent(new Event("input"));
    const header = (title) => [...table.tHead.rows[0].cells].find((cell) => cell.textContent === title);
    found.sorted = {};
    for (const title of ["Module", "All layers"]) {
      const button = header(title).querySelector("button");
      button.focus(); // as with the tab key; a button's click is also what Enter and blank do
      found.focused = document.activeElement === button;
      found.sorted[title] = [1, 2, 3].map(() => {
        button.click();
        return [header(title).getAttribute("aria-sort"), shown(), [...table.tBodies[0].rows].map((row) => row.cells[8].dataset.v)];
      });
    }
  }
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});
