"""The page's style and its one script: sorting a table by a column. Nothing is fetched."""

NAMES = {
    "accuracy": "accuracy",
    "top_5_accuracy": "top-5 accuracy",
    "f1_score_macro": "macro F1",
    "root_mean_squared_error": "root mean squared error",
    "mean_absolute_error": "mean absolute error",
    "r2_score": "R2",
    "iou": "IoU, mean over photos",
}

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --quiet: #5c5c63; --line: #dcdce0;
  --card: #f4f4f6; --mark: #0072b2; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --ink: #ececee; --quiet: #a4a4ab;
  --line: #37383c; --card: #232427; --mark: #6cb8ea; --warn: #3b3114; } }
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
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
  min-width: 8rem; }
.texts th, .texts td { text-align: left; white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--card); font-weight: 600; }
tbody tr + tr td { border-top: 1px solid var(--line); }
th button { all: unset; cursor: pointer; font: inherit; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
th[aria-sort] button { color: var(--mark); }
th[aria-sort="ascending"] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort="descending"] button::after { content: " \\25BC"; font-size: .7em; }
.picture { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .5rem;
  overflow-x: auto; }
.picture img { display: block; max-width: min(100%, 38rem); height: auto; margin: 0 auto; }
.picture img.large { max-width: max(100%, 36rem); }
@media (max-width: 30rem) { main { padding: .75rem .75rem 3rem; } h1 { font-size: 1.25rem; }
  th, td { padding: .35rem .5rem; } }
@media print { .wide { max-height: none; overflow: visible; } }
"""

# Undefined numbers come last in both directions.
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
