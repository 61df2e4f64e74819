// Small pieces of HTML.

export function make(tag, className = "", text = "", children = []) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

export function swatch(className, background = "") {
  const element = make("span", `cq-swatch ${className}`);
  if (background) element.style.background = background;
  return element;
}

export function plainTable(rows) {
  return make("table", "", "", rows.map((row) => make("tr", "", "", row.map((text) => make("td", "", text)))));
}
