// Filters the examples, and shows only the first ones of each group. Without it all are shown.
"use strict";
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const FIRST = window.innerWidth < 560 ? 3 : 6; // of a group, until its button is pressed
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const cards = all(".example");
  const words = new Map(
    cards.map((card) => [card, all(".text", card).map((text) => text.textContent).join("\n").toLowerCase()])
  );
  const nothing = document.getElementById("nothing");
  const count = document.querySelector("#examples .count");

  // Returns whether an example matches the form, as a function; null if the form is empty.
  function filter() {
    const values = Object.fromEntries(new FormData(form));
    if (!Object.values(values).some((value) => value.trim())) return null;
    const wanted = values.words.toLowerCase().split(/\s+/).filter(Boolean);
    const equal = ["kind", "group", "split", "type"].filter((name) => values[name]);
    return (card) =>
      (values.low === "" || Number(card.dataset.score) >= Number(values.low)) &&
      (values.high === "" || Number(card.dataset.score) <= Number(values.high)) &&
      equal.every((name) => card.dataset[name] === values[name]) &&
      wanted.every((word) => words.get(card).includes(word));
  }

  function update() {
    const matches = filter();
    for (const group of all(".group")) {
      const examples = all(".example", group);
      const more = group.querySelector(".more");
      const isOpen = more.getAttribute("aria-expanded") === "true";
      const found = matches ? examples.filter(matches) : examples.slice(0, isOpen ? Infinity : FIRST);
      for (const card of examples) card.hidden = !found.includes(card);
      group.hidden = found.length === 0;
      more.hidden = matches !== null || examples.length <= FIRST;
      more.textContent = isOpen ? "Show fewer" : `Show all ${examples.length}`;
    }
    for (const kind of all(".kind")) kind.hidden = all(".group", kind).every((group) => group.hidden);
    const shown = cards.filter((card) => !card.hidden).length;
    nothing.hidden = shown > 0;
    count.textContent = `${shown} of ${cards.length} shown`;
  }

  for (const more of all(".more")) {
    more.addEventListener("click", () => {
      more.setAttribute("aria-expanded", String(more.getAttribute("aria-expanded") !== "true"));
      update();
    });
  }
  form.addEventListener("input", update);
  // The fields get their first values only after the event.
  form.addEventListener("reset", () => setTimeout(update));
  nothing.querySelector("button").addEventListener("click", () => {
    form.reset();
    form.elements.words.focus();
  });
  form.hidden = false;
  update();
})();
