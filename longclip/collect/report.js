"use strict";
// Tables that sort: by the number in a cell's data-v, else by its text; cells that say nothing stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, up = head.getAttribute("aria-sort") === "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.cells[column];
      return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim();
    };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const found = typeof x === "number" && typeof y === "number"
        ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
      return up ? found : -found;
    };
    body.append(...[...body.rows].sort(order));
  });
}

// Curves that zoom: drag a box; a double click shows all again.
const font = {family: "system-ui, sans-serif", size: 12, color: "#1a1a1a"};
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  const layout = {
    ...figure.layout, font, height: 380, autosize: true, margin: {l: 60, r: 10, t: 10, b: 80},
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest", legend: {orientation: "h", yanchor: "top", y: -0.3},
  };
  Plotly.newPlot(plot, figure.data, layout, {responsive: true, displaylogo: false, showTips: false});
}
const COLUMN = 490; // pixels of half an A4 page's width within its margins
addEventListener("beforeprint", () => plots.forEach(p => Plotly.relayout(p, {width: COLUMN, height: 300})));
addEventListener("afterprint", () => plots.forEach(p => Plotly.relayout(p, {width: null, height: 380, autosize: true})));
