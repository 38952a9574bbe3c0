// The search form: addresses without empty fields, so that they can be read and shared, and "/" to get there.
"use strict";

const form = document.getElementById("search");

form.addEventListener("submit", () => {
  const empty = [...form.elements].filter((field) => field.name && !field.value.trim());
  for (const field of empty) field.disabled = true;
  // After the browser has read the form: the back button returns to this page as it is.
  setTimeout(() => empty.forEach((field) => { field.disabled = false; }));
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  form.elements.q.focus();
  form.elements.q.select();
});
