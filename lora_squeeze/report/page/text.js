// Numbers as people read them.
"use strict";

const Text = (() => {
  const grouped = new Intl.NumberFormat("en");
  const count = (value) => grouped.format(value);
  const percent = (fraction, digits = 2) => `${(100 * fraction).toFixed(digits)}%`;
  const short = (value) => Number(value.toPrecision(3)).toString();

  // Powers of 1000, as lora-squeeze prints them.
  function bytes(value) {
    if (!value) return "–";
    for (const unit of ["B", "kB", "MB", "GB"]) {
      if (value < 1000 || unit === "GB") return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
      value /= 1000;
    }
  }

  return { count, percent, short, bytes };
})();

// Elements, made of text only: names come from files that nobody vouches for.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === undefined) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}
