"use strict";
// The table of devices: headings sort, the tools above filter. Without this script it is a plain table.
(() => {
  const table = document.getElementById("fleet-table");
  const tools = document.getElementById("fleet-tools");
  const find = document.getElementById("fleet-find");
  const look = document.getElementById("fleet-look");
  const shown = document.getElementById("fleet-shown");
  const body = table.tBodies[0];
  const names = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" }); // phones-2 before phones-10
  const rows = Array.from(body.rows, (row) => ({
    row,
    words: row.textContent.toLowerCase(),
    looks: (row.dataset.look || "").split(" ").filter(Boolean),
    keys: Array.from(row.cells, (cell) => cell.dataset.v ?? cell.textContent),
  }));

  const filter = () => {
    const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let number = 0;
    for (const { row, words, looks } of rows) {
      const fits = look.value === "" || (look.value === "any" ? looks.length > 0 : looks.includes(look.value));
      row.hidden = !(fits && wanted.every((word) => words.includes(word)));
      number += row.hidden ? 0 : 1;
    }
    shown.textContent = `${number.toLocaleString("en")} of ${rows.length.toLocaleString("en")} devices`;
  };

  const sort = (column, numeric, down) => {
    const sign = down ? -1 : 1;
    const by = (a, b) => {
      const [one, other] = [a.keys[column], b.keys[column]];
      if (one === "" || other === "") return (one === "") - (other === ""); // what is not known comes last, either way
      return sign * (numeric ? one - other : names.compare(one, other));
    };
    body.append(...rows.sort(by).map(({ row }) => row));
  };

  Array.from(table.tHead.rows[0].cells).forEach((heading, column, headings) => {
    const numeric = rows.some(({ row }) => row.cells[column].dataset.v !== undefined);
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      // The most to look at comes first; of all else the least.
      const down = before === "none" ? column === headings.length - 1 : before === "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(column, numeric, down);
    });
  });

  find.addEventListener("input", filter);
  look.addEventListener("change", filter);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  filter(); // a browser that goes back keeps what was typed
})();
