"""Style sheet and script of a report's page.

The colours of dark pages are those of the charts (palette.py). On narrow screens, the cells of a
row of numbers stand below each other, each beside the name of its column: nothing scrolls sideways.
Paper is always light, and shows whole what scrolls on a screen.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --quiet: #5c5c63; --line: #dcdce0;
  --card: #f4f4f6; --mark: #0072b2; --warn: #fff4d6; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #17181a; --ink: #ececee; --quiet: #a4a4ab; --line: #37383c;
    --card: #232427; --mark: #6cb8ea; --warn: #3b3114; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
.quiet { color: var(--quiet); font-size: .9rem; margin: .5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; display: flex;
  flex-direction: column; }
.card b { font-size: 1.7rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
.card span { font-size: .9rem; }
.card i { font-style: normal; font-size: .85rem; color: var(--quiet); }
.notes { background: var(--warn); border-radius: .6rem; padding: .75rem 1rem .75rem 2rem;
  font-size: .92rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem; }
.wide:has(.sortable) { max-height: 40rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; }
tbody th { font-weight: inherit; }
tr > :first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 8rem; }
.texts th, .texts td { text-align: left; white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; }
.rows th, .rows td { text-align: left; white-space: normal; vertical-align: top; }
.rows td:last-child { min-width: 12rem; }
thead th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th button { all: unset; cursor: pointer; font: inherit; }
th button:focus-visible, .wide:focus-visible {
  outline: 2px solid var(--mark); outline-offset: 2px; }
th[aria-sort] button { color: var(--mark); }
th[aria-sort="ascending"] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"] button::after { content: " \\25BC"; font-size: .7em; }
.picture { border: 1px solid var(--line); border-radius: .6rem; padding: .25rem; }
.picture img { display: block; width: 100%; max-width: 28rem; height: auto; margin: 0 auto; }
@media (min-width: 52.01rem) {
  .picture img.large { max-width: 100%; width: auto; max-height: 60rem; } }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img, .gone { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--card); border-radius: .4rem; }
.gone { padding: 1rem; font-size: .85rem; color: var(--quiet); }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; }
figcaption b, figcaption span { display: block; }
figcaption span { color: var(--quiet); }
@media (max-width: 40rem) { main { padding: .75rem .75rem 3rem; } h1 { font-size: 1.25rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media screen and (max-width: 52rem) {
  section > .wide thead { position: absolute; clip-path: inset(50%); }
  section > .wide .sortable thead { display: block; position: sticky; top: 0; clip-path: none;
    background: var(--card); }
  section > .wide thead tr { display: flex; flex-wrap: wrap; }
  section > .wide thead th { position: static; min-width: 0; padding: .35rem .5rem; }
  section > .wide tbody tr { display: grid;
    grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); column-gap: 1rem;
    padding: .5rem .6rem; }
  section > .wide tbody tr + tr { border-top: 1px solid var(--line); }
  section > .wide tbody td { display: flex; justify-content: space-between; gap: .5rem; border: 0;
    padding: .1rem 0; min-width: 0; white-space: normal; }
  section > .wide tbody th { grid-column: 1 / -1; border: 0; padding: .1rem 0; font-weight: 600; }
  section > .wide tbody td::before { content: attr(data-column); color: var(--quiet);
    white-space: normal; text-align: left; }
  section > .wide table:not(.sortable) tbody tr { grid-template-columns: minmax(0, 1fr) auto; }
  section > .wide table:not(.sortable) tbody th { grid-column: 1; }
  section > .wide table:not(.sortable) td:nth-child(2)::before { content: none; }
  section > .wide table:not(.sortable) td:nth-child(n + 3) { grid-column: 1 / -1; }
  section > .wide tbody td:empty { display: none; } }
@media print {
  :root { color-scheme: light; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  .wide, .wide:has(.sortable) { max-height: none; overflow: visible; border: 0; }
  table { font-size: 8.5pt; }
  thead th { position: static; }
  th, td { white-space: normal; padding: .25rem .4rem; }
  tr > :first-child, .rows td:last-child { min-width: 6em; }
  .rows td { overflow-wrap: anywhere; min-width: 4em; }
  .picture img { width: auto; max-width: min(100%, 13cm); max-height: 21cm; }
  .picture img.large { max-width: 100%; }
  h2 { break-after: avoid; }
  thead, tr, figure, .card, .picture, .notes li { break-inside: avoid; }
  .card, .notes { border: 1px solid var(--line); } }
"""

# Sorts a table by a column; undefined numbers come last in both directions.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ||
      (column > 0 && head.getAttribute("aria-sort") !== "descending");
    const keyed = [...body.rows].map(row => {
      const cell = row.cells[column];
      const value = cell.dataset.v === undefined ? cell.textContent : cell.dataset.v;
      return [column ? (value === "" ? NaN : Number(value)) : value, row];
    });
    keyed.sort(([a], [b]) => {
      if (column === 0) return (down ? -1 : 1) * a.localeCompare(b);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? b - a : a - b;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
"""
