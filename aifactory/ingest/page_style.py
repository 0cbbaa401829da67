"""The look of a corpus's page: one column of quiet type, slate for what stays and one accent for what was taken.

Light, dark, print and phone are all here; the charts take their colours from it by the classes of their bars.
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1a1e23; --soft: #59636e; --line: #e3e5e8; --well: #f4f5f6;
  --kept: #5f7183; --held: #a3b0bc; --rest: #d9dfe4; --taken: #d1492c; --accent-text: #b23a20;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e9ebee; --soft: #9ba5b0; --line: #2c3137; --well: #1c2024;
    --kept: #8496a9; --held: #53606e; --rest: #333b44; --taken: #ff7f5e; --accent-text: #ff9a7f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 68rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .875em; }
h1 { margin: .25rem 0 0; max-width: 24em; font-size: clamp(1.5rem, 4vw, 2.25rem); line-height: 1.2; font-weight: 650; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 0 0 .25rem; font-size: 1.375rem; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; }
h3 { margin: 0; font-size: 1rem; font-weight: 650; }
p { margin: 0; max-width: 44em; }
section { margin-top: 4rem; }
.eyebrow, .soft, figcaption { color: var(--soft); }
.eyebrow { font-size: .875rem; }
.soft { font-size: .9375rem; }

.numbers { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1.5rem; margin: 2.25rem 0 0; }
.numbers div { border-top: 2px solid var(--line); padding-top: .625rem; }
.numbers dt { color: var(--soft); font-size: .875rem; }
.numbers dd { margin: 0; }
.numbers .number { font-size: 1.75rem; line-height: 1.2; font-weight: 600; letter-spacing: -.02em; white-space: nowrap; }
.numbers .beside { color: var(--soft); font-size: .875rem; }
.numbers .rejected { border-top-color: var(--taken); }

.whole { margin: 2.25rem 0 0; }
.whole svg.chart { width: 100%; height: 1.25rem; border-radius: 3px; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0 0; padding: 0; list-style: none; color: var(--soft); font-size: .875rem; }
.key li::before { content: ""; display: inline-block; width: .625rem; height: .625rem; margin-right: .4375rem; border-radius: 2px; background: var(--kept); }
.key .held::before { background: var(--held); }
.key .taken::before { background: var(--taken); }

svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { fill: var(--ink); font-size: 12px; stroke: none; }
.chart .axis text { fill: var(--soft); }
.chart .axis.y text { text-anchor: end; }
.chart .axis.x text { text-anchor: middle; }
.chart .value { fill: var(--ink); }
.chart .horizontal .value, .chart .horizontalstackedbar-graph .value { text-anchor: start; }
.chart .vertical .value { text-anchor: middle; }
.chart path { display: none; }
.chart .kept { fill: var(--kept); }
.chart .held { fill: var(--held); }
.chart .rest { fill: var(--rest); }
.chart .taken { fill: var(--taken); }
.chart rect:hover { opacity: .8; }

.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 3rem 4rem; margin-top: 1.75rem; }
figure { margin: 0; min-width: 0; max-width: 34rem; }
figure > figcaption { margin: .125rem 0 1rem; font-size: .9375rem; }
.most { margin: 0; padding: 0; list-style: none; }
.most li { display: grid; grid-template-columns: 4.5rem minmax(0, 1fr); padding: .5rem 0; border-bottom: 1px solid var(--line); }
.most b { font-weight: 600; }
.most h3, .grid > div > h3 { margin-bottom: .25rem; }

.stage { margin-top: 2.25rem; }
.stage > header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; gap: 0 1.5rem; }
.stage > header b { font-weight: 600; }
.stage > p { padding-bottom: .375rem; max-width: none; border-bottom: 1px solid var(--line); }
.rule > summary, div.rule { display: grid; grid-template-columns: minmax(0, 19.5rem) minmax(0, 1fr) 6rem 4rem 4.25rem; gap: 0 1rem; align-items: baseline; padding: .4375rem 0; border-bottom: 1px solid var(--line); }
.rule > summary { cursor: pointer; list-style: none; }
.rule > summary::-webkit-details-marker { display: none; }
.rule > .name, .rule > summary > .name { position: relative; padding-left: 1rem; }
.rule > summary > .name::before { content: "▸"; position: absolute; left: 0; color: var(--soft); font-family: sans-serif; }
.rule[open] > summary > .name::before { content: "▾"; }
.rule > summary:hover .name { color: var(--accent-text); }
.rule > summary:focus-visible { outline: 2px solid var(--taken); outline-offset: 2px; border-radius: 2px; }
.name .of { color: var(--soft); }
.rule .words { color: var(--soft); font-size: .9375rem; }
.rule .number { text-align: right; white-space: nowrap; }
.rule .percent { text-align: right; white-space: nowrap; color: var(--soft); }
.bar { align-self: center; height: .5rem; border-radius: 2px; background: var(--well); overflow: hidden; }
.bar > span { display: block; height: 100%; min-width: 2px; background: var(--taken); }

.example { margin: .75rem 0 1.25rem 1rem; max-width: none; }
.example > figcaption { margin: 0 0 .25rem; font-size: .875rem; }
.example pre { margin: 0; padding: .625rem .75rem; max-height: 11rem; overflow: auto; background: var(--well); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; line-height: 1.45; }

table { width: 100%; max-width: 34rem; margin-top: 1.25rem; border-collapse: collapse; }
th, td { padding: .4375rem 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
thead th { color: var(--soft); font-size: .875rem; }
table .number { padding-left: .75rem; text-align: right; white-space: nowrap; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .9375rem; }
footer p + p { margin-top: .375rem; }

@media (max-width: 44rem) {
  section { margin-top: 3rem; }
  .numbers { grid-template-columns: 1fr 1fr; gap: 1.25rem; }
  .rule > summary, div.rule { grid-template-columns: minmax(0, 1fr) auto 4.25rem; gap: 0 .75rem; }
  .rule .name { grid-area: 1 / 1; } .rule .number { grid-area: 1 / 2; } .rule .percent { grid-area: 1 / 3; }
  .rule .words { grid-area: 2 / 1 / auto / -1; padding-left: 1rem; }
  .rule .bar { grid-area: 3 / 1 / auto / -1; margin: .3125rem 0 .125rem 1rem; width: calc(100% - 1rem); }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --well: #f2f2f2; --kept: #5f7183; --held: #a3b0bc; --rest: #d9dfe4; --taken: #d1492c; --accent-text: #000; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  section { margin-top: 2rem; }
  figure, .stage > header, .stage > p, .rule, tr { break-inside: avoid; }
  .rule > summary > .name::before { content: ""; }
}
"""
