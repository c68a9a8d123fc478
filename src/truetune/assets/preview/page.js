"use strict";
// Filters the rows of this page; their text is read once, when the first letter is typed.
const search = document.getElementById("search");
const boxes = [...document.querySelectorAll("#parts input")];
const rows = [...document.querySelectorAll("#rows article")];
const count = document.getElementById("count");
const all = count.textContent;
let texts = null;

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const parts = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  if (words.length) texts ??= rows.map((row) => row.textContent.replaceAll("↵", "").toLowerCase());
  let left = 0;
  rows.forEach((row, i) => {
    row.hidden = !(parts.has(row.dataset.part) && words.every((word) => texts[i].includes(word)));
    left += !row.hidden;
  });
  count.textContent = left === rows.length ? all : left + " found";
  document.getElementById("none").hidden = left > 0;
}

search.addEventListener("input", filter);
boxes.forEach((box) => box.addEventListener("change", filter));
