// A table that a click on a title sorts.
import { make } from "./elements.js";

/** titles, hints (of titles) and show (functions) by column; state: {column, descending}, kept by the caller. */
export function drawTable({ titles, hints, show, rows }, state) {
  const body = make("tbody");
  const heads = titles.map((title, i) => {
    const head = make("th", "", title);
    head.title = hints[i];
    head.onclick = () => {
      state.descending = state.column === i ? !state.descending : i > 0;
      state.column = i;
      fill();
    };
    return head;
  });
  function fill() {
    const sign = state.descending ? -1 : 1;
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    rows.sort((a, b) => sign * compare(a[state.column], b[state.column]));
    heads.forEach((head, i) => {
      head.textContent = titles[i] + (i === state.column ? (state.descending ? " ▼" : " ▲") : "");
    });
    body.replaceChildren(...rows.map((row) => make("tr", "", "", row.map((value, i) => make("td", "", show[i](value))))));
  }
  fill();
  const table = make("table", "", "", [make("thead", "", "", [make("tr", "", "", heads)]), body]);
  return make("div", "cq-table", "", [table]);
}
