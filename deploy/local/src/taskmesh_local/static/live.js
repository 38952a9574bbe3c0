// Keeps a list fresh while somebody looks at it: fetches the same page and puts its <main> and count in place.
"use strict";

async function refresh() {
  if (!document.hidden && !document.querySelector("details[open], form :focus")) {
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of ["main", "header .count"]) {
        const [old, now] = [document.querySelector(part), fresh.querySelector(part)];
        if (old && now && old.innerHTML !== now.innerHTML) old.replaceWith(now);
      }
    } catch {
      // The server is down; the next round tries again.
    }
  }
  setTimeout(refresh, 2000);
}

setTimeout(refresh, 2000);
