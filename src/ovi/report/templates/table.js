// Tables: cells by data, sorted by any column.

const content = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function option(value, text, selected) {
  const made = element("option", { value, text });
  made.selected = !!selected;
  return made;
}

// Five significant digits at most, thousands apart, no false precision.
function figure(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  const places = size === 0 ? 0 : Math.max(0, Math.min(5, digits - 1 - Math.floor(Math.log10(size))));
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}

// A count, or a mean of counts.
function whole(value) {
  return Number.isInteger(value) ? value.toLocaleString("en") : figure(value, 3);
}

function large(value, unit = "") {
  if (value === null || value === undefined) return "";
  for (const [factor, prefix] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= factor) return `${figure(value / factor, 3)} ${prefix}${unit}`;
  }
  return `${figure(value, 3)}${unit && " "}${unit}`;
}

function cellValue(row, column) {
  const cell = row.cells[column];
  if (!cell) return "";
  return cell.dataset.value !== undefined ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent.trim();
}

// What is missing comes last, whichever way a column is sorted.
function sortRows(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const way = descending ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [cellValue(a, column), cellValue(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return way * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
  });
  body.append(...rows);
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    head.setAttribute("aria-sort", i === column ? (descending ? "descending" : "ascending") : "none");
  });
}

document.querySelectorAll("table.sortable").forEach((table) => {
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head || !event.target.closest("button")) return;
    sortRows(table, head.cellIndex, head.getAttribute("aria-sort") === "ascending");
  });
});
