// The filter of the examples. Without it the page shows all of them.
"use strict";
(() => {
  const FIRST = window.innerWidth < 560 ? 3 : 6; // of a group, until somebody asks for more
  const form = document.getElementById("filter");
  if (!form) return;
  const nothing = document.getElementById("nothing");
  const count = document.querySelector("#examples .count");
  const kinds = [...document.querySelectorAll(".kind")].map((element) => ({
    element,
    groups: [...element.querySelectorAll(".group")].map(readGroup),
  }));
  const groups = kinds.flatMap((kind) => kind.groups);
  const total = groups.reduce((sum, group) => sum + group.cards.length, 0);

  function readGroup(element) {
    const cards = [...element.querySelectorAll(".example")].map((card) => ({
      element: card,
      score: Number(card.dataset.score),
      words: [...card.querySelectorAll(".text")].map((text) => text.textContent).join("\n").toLowerCase(),
    }));
    return { element, cards, more: element.querySelector(".more"), open: false };
  }

  function wish() {
    const values = Object.fromEntries(new FormData(form));
    const words = values.words.toLowerCase().split(/\s+/).filter(Boolean);
    const low = values.low === "" ? -Infinity : Number(values.low);
    const high = values.high === "" ? Infinity : Number(values.high);
    const equal = ["kind", "group", "split", "type"].filter((name) => values[name]);
    const active = words.length + equal.length > 0 || values.low !== "" || values.high !== "";
    const matches = (card) =>
      card.score >= low &&
      card.score <= high &&
      equal.every((name) => card.element.dataset[name] === values[name]) &&
      words.every((word) => card.words.includes(word));
    return { active, matches };
  }

  function show() {
    const { active, matches } = wish();
    let shown = 0;
    for (const group of groups) {
      const most = active || group.open ? Infinity : FIRST;
      let visible = 0;
      for (const card of group.cards) {
        card.element.hidden = visible >= most || !matches(card);
        if (!card.element.hidden) visible += 1;
      }
      group.element.hidden = visible === 0;
      group.more.hidden = active || group.cards.length <= FIRST;
      group.more.textContent = group.open ? "Show fewer" : `Show all ${group.cards.length}`;
      group.more.setAttribute("aria-expanded", String(group.open));
      shown += visible;
    }
    for (const kind of kinds) kind.element.hidden = kind.groups.every((group) => group.element.hidden);
    nothing.hidden = shown > 0;
    count.textContent = `${shown} of ${total} shown`;
  }

  for (const group of groups) {
    group.more.addEventListener("click", () => {
      group.open = !group.open;
      show();
    });
  }
  form.addEventListener("input", show);
  // The fields have their first values only after the event.
  form.addEventListener("reset", () => setTimeout(show));
  nothing.querySelector("button").addEventListener("click", () => {
    form.reset();
    form.elements.words.focus();
  });
  form.hidden = false;
  show();
})();
