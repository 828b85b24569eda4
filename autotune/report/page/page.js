"use strict";
const byId = id => document.getElementById(id);
const table = byId("table"), body = table && table.tBodies[0];
const heads = table ? [...table.tHead.rows[0].cells] : [];

// copy
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", async () => {
  const source = byId(button.dataset.copy);
  try { await navigator.clipboard.writeText(source.textContent); button.textContent = "Copied"; }
  catch { getSelection().selectAllChildren(source); button.textContent = "Selected"; }
});

// sort: numbers before texts, unknown values last in both directions
const value = (row, at) => {
  const text = row.cells[at].textContent.trim(), number = parseFloat(text.replaceAll(",", ""));
  return text === "" || text === "-" ? null : heads[at].className === "n" && !isNaN(number) ? number : text;
};
heads.forEach((head, at) => head.firstChild.addEventListener("click", () => {
  const down = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of heads) other.removeAttribute("aria-sort");
  head.ariaSort = down > 0 ? "ascending" : "descending";
  const keyed = [...body.rows].map(row => [value(row, at), row]);
  keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
    : down * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
  body.append(...keyed.map(([, row]) => row));
}));

// filter
const show = () => {
  const words = byId("filter").value.toLowerCase().split(/\s+/), status = byId("status").value;
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = (status && row.dataset.status !== status) || !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  byId("count").textContent = `${shown} of ${body.rows.length} trials`;
};
if (table) { for (const id of ["filter", "status"]) byId(id).addEventListener("input", show); show(); }

// plots: plotly lies compressed in the page
const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const cut = text => text.length > 90 ? text.slice(0, 89) + "…" : text;
const rowText = trial => {
  const row = byId("t" + trial);
  if (!row) return `trial ${trial}`;
  const reason = row.cells[heads.length - 1], summary = reason.querySelector("summary");
  const cells = heads.slice(0, -1).map((head, at) => [head.textContent, row.cells[at].textContent]);
  cells.push(["reason", (summary || reason).textContent]);
  return cells.filter(([, text]) => text.trim()).map(([name, text]) => `<b>${escaped(name)}</b> ${escaped(cut(text.trim()))}`).join("<br>");
};
const find = trial => {
  const row = byId("t" + trial);
  if (!row) return;
  for (const old of document.querySelectorAll("tr.marked")) old.classList.remove("marked");
  if (row.hidden) { byId("filter").value = byId("status").value = ""; show(); }
  row.classList.add("marked");
  row.scrollIntoView({block: "center"});
};
const load = async () => {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), c => c.charCodeAt(0));
  const source = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = source;
  document.head.append(script);
  const touch = matchMedia("(pointer: coarse)").matches;
  const figures = JSON.parse(byId("plots").textContent);
  for (const [at, {data, layout}] of figures.entries()) {
    const place = byId("plot-" + at);
    for (const trace of data) if (trace.meta === "trials") trace.hovertext = trace.customdata.map(rowText);
    if (touch) layout.dragmode = false;  // dragging scrolls the page
    if (innerWidth < 600 && data.length > 3) layout.height += 20 * data.length;  // the legend has one column there
    await Plotly.newPlot(place, data, layout, {displayModeBar: false, responsive: true});
    place.on("plotly_click", event => { if (event.points[0].data.meta === "trials") find(event.points[0].customdata); });
  }
  const heights = figures.map(({layout}) => layout.height);
  const resize = (width, highest, size) => heights.forEach((height, at) => Plotly.relayout(byId("plot-" + at), {
    width, height: Math.min(highest, height), autosize: !width, "legend.font.size": size,
  }));
  addEventListener("beforeprint", () => resize(505, 385, 10));  // two in a row on A4
  addEventListener("afterprint", () => resize(undefined, Infinity, 13));
  document.documentElement.dataset.plots = figures.length;
};
if (document.querySelector(".plot")) load().catch(error => {
  const note = byId("no-plots");
  note.hidden = false;
  note.textContent = `The plots cannot be drawn by this browser (${error.message}); every number is in the table.`;
});
