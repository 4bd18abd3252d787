// One kind of table for everything: sorted by its headers, filtered, saved as CSV; it scrolls inside its own box.
//
// A column is {label, hint, sort(row), cell(row), csv: [[header, value(row)], ...], number, more}; without `sort` or `csv`
// it has none; with `more` it is shown on demand. A filter is {label, options: [[value, text], ...], test(row, value),
// first: value chosen at first}.

function dataTable({ name, caption, rows, columns, filters = [], words, rowAttributes = () => ({}), shown = () => {} }) {
  const kind = ({ number, more }) => [number && "number", more && "further"].filter(Boolean).join(" ") || null;
  const filled = (row) => columns.map((column, i) =>
    h(i ? "td" : "th", { class: kind(column), scope: i ? null : "row" }, column.cell(row)));
  const lines = rows.map((row) => ({ row, words: words(row).toLowerCase(), node: h("tr", rowAttributes(row), filled(row)) }));
  let sorted = { column: null, up: true };

  const heads = columns.map((column) => h("th", { scope: "col", class: kind(column), title: column.hint },
    column.sort ? h("button", { type: "button", class: "sort", onclick: () => sortBy(column) }, column.label) : column.label));
  const body = h("tbody");
  const search = h("input", { type: "search", placeholder: "filter by text", "aria-label": `filter ${caption} by text`,
    oninput: show });
  const selects = filters.filter((filter) => filter.options.length > 1).map((filter) => [filter,
    h("select", { "aria-label": `filter ${caption} by ${filter.label}`, onchange: show },
      h("option", { value: "" }, `any ${filter.label}`),
      filter.options.map(([value, text]) => h("option", { value, selected: value === filter.first }, text)))]);
  const count = h("span", { class: "count", role: "status" });

  function sortBy(column) {  // ascending, descending, unsorted
    const again = sorted.column === column;
    sorted = again && !sorted.up ? { column: null, up: true } : { column, up: !again };
    show();
  }

  function current() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = lines.filter(({ row, words }) => wanted.every((word) => words.includes(word))
      && selects.every(([filter, box]) => !box.value || filter.test(row, box.value)));
    if (!sorted.column) return kept;
    const keyed = kept.map((line) => [sorted.column.sort(line.row), line]);
    const missing = (key) => key === null || key === undefined || key === "";
    keyed.sort(([a], [b]) => {  // missing values come last in both directions
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
      return sorted.up ? order : -order;
    });
    return keyed.map(([, line]) => line);
  }

  function show() {
    const kept = current();
    body.replaceChildren(...kept.map((line) => line.node));
    if (!kept.length) body.append(h("tr", null, h("td", { colspan: columns.length, class: "none" }, "Nothing to show.")));
    columns.forEach((column, i) => {
      const direction = sorted.column === column ? (sorted.up ? "ascending" : "descending") : "none";
      if (column.sort) heads[i].setAttribute("aria-sort", direction);
    });
    count.textContent = kept.length === rows.length ? many(rows.length, "row") : `${kept.length} of ${rows.length} rows`;
    shown(kept.map((line) => line.row));
  }

  function save() {
    const cells = columns.flatMap((column) => column.csv ?? []);
    const table = [cells.map(([header]) => header), ...current().map(({ row }) => cells.map(([, value]) => value(row)))];
    saveAs(new Blob([table.map((row) => row.map(csvCell).join(",") + "\r\n").join("")], { type: "text/csv" }), `${name}.csv`);
  }

  const head = [h("caption", { class: "unseen" }, caption), h("thead", null, h("tr", null, heads))];
  const grid = h("table", null, head, body), box = scrolling(caption, grid), hidden = columns.filter((column) => column.more).length;
  const wider = h("button", { type: "button", class: "wider", "aria-pressed": "false", onclick() {
    wider.setAttribute("aria-pressed", String(grid.classList.toggle("widened")));
    cue();
  } }, many(hidden, "more column"));
  box.classList.toggle("long", rows.length > 30);
  show();
  refreshes.add(() => {
    for (const { row, node } of lines) node.replaceChildren(...filled(row));
    show();
  });
  const frame = h("div", { class: "table-frame" }, box);
  const cue = () => frame.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  box.addEventListener("scroll", cue, { passive: true });
  new ResizeObserver(cue).observe(box);
  return h("div", { class: "data-table" },
    h("div", { class: "tools" }, rows.length > 3 ? [search, ...selects.map(([, select]) => select)] : [], count,
      hidden > 0 && wider, h("button", { type: "button", class: "save", onclick: save }, "Save as CSV")),
    frame);
}

const scrolling = (label, table) => h("div", { class: "table-box", tabindex: 0, role: "region", "aria-label": label }, table);

function csvCell(value) {  // an apostrophe before text that a spreadsheet would take for a formula
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
