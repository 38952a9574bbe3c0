// Keeps a list fresh while somebody looks at it: fetches the same page, and puts what has changed in place.
"use strict";

// What a person is in the middle of is left alone: a field, an opened part, a selected text.
function busy() {
  return document.hidden || document.querySelector("[data-live] details[open], [data-live] :is(input, select):focus")
    || !getSelection().isCollapsed;
}

function replace(old, now) {
  const focused = old.contains(document.activeElement) && document.activeElement.getAttribute("href");
  old.replaceWith(now);
  // The keyboard stays on the row where it was.
  if (focused) now.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

async function refresh() {
  if (!busy()) {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const old of document.querySelectorAll("[data-live]")) {
        const now = fresh.getElementById(old.id);
        if (now && !busy() && old.innerHTML !== now.innerHTML) replace(old, now);
      }
    } catch {
      // The server is down; the next round tries again.
    }
  }
  setTimeout(refresh, 2000);
}

setTimeout(refresh, 2000);
