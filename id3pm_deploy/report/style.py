"""How the page looks, in light and dark and in a narrow window."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #23242a; --faint: #63656f;
  --line: #dcdad4; --pass: #17683c; --fail: #a92323; --state: #1f5fbf; --x0: #b35c00;
  --single: #6b3fa0; --oracle: #1b7a74; --panel: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181c; --ink: #e6e6e3;
  --faint: #a2a4ad; --line: #3a3c44; --pass: #2f8f5b; --fail: #d65656;
  --state: #7fb0ff; --x0: #f0a24e; --single: #c3a2f0; --oracle: #5cc9bf;
  --panel: #1f2025; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { display: flex; gap: .5rem 1.25rem; align-items: flex-start;
  padding: 1.1rem 1.25rem; background: var(--panel); border: 1px solid var(--line);
  border-left: 6px solid; border-radius: 6px; }
header.pass { border-left-color: var(--pass); }
header.fail { border-left-color: var(--fail); }
.word { margin: .1rem 0 0; padding: .1rem .7rem; border-radius: 4px; color: #fff;
  font-weight: 700; letter-spacing: .04em; }
.pass .word { background: var(--pass); } .fail .word { background: var(--fail); }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; overflow-wrap: anywhere; }
ul { margin: .3rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
header p { margin: .3rem 0 0; }
.note, figcaption { color: var(--faint); font-size: .875rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th { font-weight: 600; text-align: left; }
.numbers th, .numbers td, .facts th, .facts td { padding: .35rem .55rem;
  border-bottom: 1px solid var(--line); }
.numbers td, .numbers thead th { white-space: nowrap; }
.numbers tbody th { min-width: 11rem; }
.numbers thead th { color: var(--faint); font-weight: 500; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers td { font-variant-numeric: tabular-nums; }
.mark { font-weight: 600; }
.mark.pass { color: var(--pass); } .mark.fail { color: var(--fail); }
.facts th { color: var(--faint); font-weight: 500; vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.pictures th, .pictures td { padding: .2rem .25rem; }
.pictures thead th { color: var(--faint); font-weight: 500; text-align: center;
  white-space: nowrap; }
.pictures tbody th { padding-right: .8rem; max-width: 9rem; }
.pictures small { color: var(--faint); font-weight: 400; }
.pictures img { display: block; width: 112px; height: auto; min-width: 72px;
  image-rendering: pixelated; border-radius: 3px; }
figure { margin: 0; }
.plot { display: block; width: 100%; min-width: 38rem; height: auto; }
svg text { fill: var(--faint); font-size: 12px; font-family: inherit; }
svg .axis { stroke: var(--faint); } svg .grid { stroke: var(--line); }
svg .limit { stroke: var(--fail); stroke-dasharray: 6 4; fill: none; }
svg text.limit-name { fill: var(--fail); font-size: 11px; }
svg polyline { fill: none; stroke-width: 1.6; }
svg polyline.x0 { stroke-dasharray: 5 3; }
svg polyline.single { stroke-dasharray: 2 3; }
svg polyline.oracle { stroke-dasharray: 8 3 2 3; }
svg .state { stroke: var(--state); } svg circle.state { fill: var(--state); }
svg .x0 { stroke: var(--x0); } svg circle.x0 { fill: var(--x0); }
svg .single { stroke: var(--single); } svg circle.single { fill: var(--single); }
svg .oracle { stroke: var(--oracle); } svg circle.oracle { fill: var(--oracle); }
.key { font-weight: 600; } .key.state { color: var(--state); }
.key.x0 { color: var(--x0); } .key.single { color: var(--single); }
.key.oracle { color: var(--oracle); }
details { margin-top: 2.4rem; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) { header { flex-direction: column; }
  main { padding: 1rem .75rem 3rem; } .pictures img { width: 84px; }
  .pictures tbody th { max-width: 6rem; } .numbers tbody th { min-width: 8rem; } }
"""
