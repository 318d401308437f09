"""The page's style sheet: one set of colours by name, light and dark; figures use the same names."""

from fleetfit.runs.report.markup import Markup

STYLE = Markup("""
:root { color-scheme: light dark;
  --page: #f6f6f3; --panel: #ffffff; --ink: #1b1f24; --muted: #59626e; --line: #dcdfe3; --faint: #eceef0;
  --accent: #1d5fa6; --second: #b8500b; --good: #24734a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121519; --panel: #1a1e24; --ink: #e8eaed; --muted: #a0a9b5; --line: #343b45; --faint: #252b33;
  --accent: #74b4ff; --second: #ffa25e; --good: #62cb94; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", sans-serif; }
body > * { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
h1, h2, h3 { font-family: Charter, "Iowan Old Style", Georgia, "Liberation Serif", serif; line-height: 1.2;
  text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.9rem, 5vw, 2.9rem); margin: .2em 0 .35em; letter-spacing: -.01em; }
h2 { font-size: 1.6rem; margin: 0 0 .3em; }
h3 { font-size: 1.12rem; margin: 0 0 .5em; }
p { margin: 0 0 .9em; max-width: 72ch; overflow-wrap: anywhere; }
body > header { padding-top: 40px; }
.kicker { color: var(--muted); font-size: .9rem; margin: 0; overflow-wrap: anywhere; }
.lede { font-size: 1.15rem; max-width: 64ch; }
.note { color: var(--muted); font-size: .9rem; }
h1.verdict { font-size: clamp(1.2rem, 2.6vw, 1.6rem); line-height: 1.35; font-weight: 600;
  max-width: 46em; text-wrap: pretty; }
.tools { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin: 0 0 12px; font-size: .9rem; }
.tools[hidden], tr[hidden] { display: none; }
.tools label { display: flex; align-items: center; gap: 8px; color: var(--muted); max-width: 100%; }
.tools input, .tools select { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: 6px 10px; min-width: 0; max-width: 100%; } .tools output { color: var(--muted); }
#fleet > .panel { padding: 0; } .tall { max-height: min(78vh, 720px); overflow: auto; }
#fleet-table caption { padding: 14px 18px 6px; } #fleet-table tr > :last-child { padding-right: 18px; }
#fleet-table tr > :first-child { padding-left: 18px; position: sticky; left: 0; background: var(--panel); }
.tall thead th { position: sticky; top: 0; background: var(--panel); box-shadow: inset 0 -1px var(--line);
  padding-top: 10px; z-index: 1; } .tall thead th:first-child { z-index: 2; }
#fleet-table tbody th { overflow-wrap: anywhere; min-width: 8em; } #fleet-table td + td { min-width: 4.6em; }
#fleet-table td:nth-child(2) { overflow-wrap: anywhere; min-width: 7.5em; }
#fleet-table td:last-child { min-width: 17em; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 4px 0; cursor: pointer;
  text-align: inherit; } th button:hover { color: var(--accent); }
th[aria-sort] button::after { content: "↕"; opacity: .45; padding-left: .3em; }
th[aria-sort=ascending] button::after { content: "↑"; opacity: 1; }
th[aria-sort=descending] button::after { content: "↓"; opacity: 1; }
.look { display: inline-block; margin: 0 6px 3px 0; padding: 0 8px; border: 1px solid var(--line); border-radius: 99px;
  font-size: .78rem; line-height: 1.6; color: var(--muted); }
.look.below-sent, .look.below-alone { color: var(--second); border-color: currentColor; white-space: nowrap; }
.look.over, .look.left-out, .look.absent { color: var(--bad); border-color: currentColor; border-radius: 10px; }
dl.commands { display: block; } dl.commands > div { margin: 0 0 12px; }
dl.commands dt { color: var(--ink); } dl.commands dd { text-align: left; }
dl.commands code { display: block; overflow-x: auto; white-space: pre; background: var(--faint); border-radius: 8px;
  padding: 8px 12px; margin-top: 3px; }
#glossary h3 { margin: 20px 0 8px; } dl.terms { grid-template-columns: minmax(5em, auto) 1fr; max-width: 72ch; }
dl.terms dt { color: var(--ink); } dl.terms dd { text-align: left; color: var(--muted); overflow-wrap: break-word; }
nav { margin: 22px 0 0; border-block: 1px solid var(--line); padding: 8px 0; }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0; padding: 0; font-size: .9rem; }
nav a { color: var(--accent); text-decoration: none; display: inline-block; padding: 4px 0; }
nav a:hover { text-decoration: underline; }
section { margin: 52px 0 0; scroll-margin-top: 12px; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 18px; min-width: 0; }
.panel > p:last-child { margin-bottom: 0; }
.grid + .note, .panel > table + .note, .scroll + .note { margin: 14px 0 0; }
.grid:has(> .panel:only-child) { grid-template-columns: minmax(0, 820px); }
.grid > .panel:only-child { display: flex; flex-wrap: wrap; gap: 10px 34px; align-items: flex-start; }
.grid > .panel:only-child > * { flex: 1 1 100%; min-width: 0; margin-top: 0; }
.grid > .panel:only-child > :is(figure, .below, .tight) { flex: 0 1 345px; }
details > .grid { margin-top: 14px; } details.cluster + details.cluster { margin-top: 8px; }
.scroll tbody th { min-width: 6em; }
.below { margin-top: 18px; } .ends { display: flex; justify-content: space-between; gap: 12px; margin-bottom: 6px; }
.panel > dl { margin-top: 14px; } figure + .tight { margin-top: 16px; }
.hero { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  margin-top: 26px; }
.tiles { display: grid; gap: 1px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 158px), 1fr));
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.tile { background: var(--panel); padding: 12px 14px; display: flex; flex-direction: column; justify-content: center; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile p { color: var(--muted); font-size: .84rem; line-height: 1.35; margin: 2px 0 0; }
ul.noted { padding-left: 1.1em; margin: 0; font-size: .88rem; overflow-wrap: anywhere; }
#data td, #data th:has(+ .barcell) { overflow-wrap: anywhere; }
ul.noted li { margin: 0 0 .45em; }
ol.how { padding-left: 1.3em; margin: 0; } ol.how li { margin: 0 0 .6em; max-width: 68ch; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 3px 14px; margin: 0; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.bar { display: block; background: var(--faint); border-radius: 4px; height: 10px; overflow: hidden;
  min-width: 50px; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 4px 0 0 4px; }
.bar i.grey { background: var(--muted); } .bar i.second { background: var(--second); }
.bar i.over { background: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .86rem; padding: 0 0 6px; caption-side: top; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; } thead th { color: var(--muted); font-weight: 500; font-size: .82rem; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
.num { text-align: right; white-space: nowrap; } .barcell + .num { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.barcell { width: 34%; vertical-align: middle; }
tr.chosen > * { color: var(--accent); font-weight: 600; }
.tag { display: inline-block; font-size: .74rem; font-weight: 600; border: 1px solid currentColor; border-radius: 99px;
  padding: 0 7px; white-space: nowrap; line-height: 1.5; }
figure { margin: 0; } figcaption { color: var(--muted); font-size: .86rem; margin-top: 6px; max-width: 72ch; }
svg { display: block; max-width: 100%; height: auto; }
.tight table { font-size: .79rem; } .tight th, .tight td { padding-right: 5px; white-space: nowrap; }
.tight tr.chosen > * { font-weight: 500; } th .note { line-height: 1.3; }
.letter { color: var(--second); display: inline-block; min-width: .9em; }
.beside { display: flex; flex-wrap: wrap; gap: 20px 34px; align-items: flex-start; }
.beside > figure { flex: 0 1 auto; min-width: 0; } .beside > .scroll { flex: 1 1 300px; min-width: 0; }
.beside figcaption { max-width: 230px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--muted); font-size: .88rem; margin: 0 0 14px;
  padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 6px; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
details.cluster { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
details.cluster > summary { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
details.cluster[open] > summary { margin-bottom: 14px; }
pre { overflow-x: auto; background: var(--faint); padding: 14px; border-radius: 8px; font-size: .82rem;
  line-height: 1.45; }
footer details { margin: 0 0 14px; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .92em; }
body > footer { margin-top: 56px; padding-bottom: 48px; color: var(--muted); font-size: .88rem; }
a:focus-visible, summary:focus-visible, .tools :focus-visible, th button:focus-visible,
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; font-size: 12px; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
svg .small { font-size: 11px; fill: var(--muted); } svg .strong { font-weight: 600; } svg .paper { fill: var(--panel); }
svg .axis { stroke: var(--line); fill: none; } svg .limit { stroke: var(--bad); stroke-dasharray: 4 3; fill: none; }
svg .limit-text { fill: var(--bad); font-size: 11px; }
svg .over { fill: none; stroke: var(--muted); opacity: .5; } svg .fits { fill: var(--muted); }
svg .front { fill: var(--accent); } svg .choice { fill: none; stroke: var(--second); stroke-width: 2.5; }
svg .letters { fill: var(--second); font-weight: 600; font-size: 11px; stroke: var(--panel); stroke-width: 3;
  paint-order: stroke; }
svg .mid { fill: #14171b; } svg .value { font-size: 11px; fill: var(--ink); stroke: var(--panel); stroke-width: 3;
  paint-order: stroke; }
svg .heat { fill: var(--accent); }
svg .cells { stroke: var(--accent); stroke-width: .96; } svg .box { fill: var(--panel); stroke: var(--ink); }
svg .source { fill: var(--faint); stroke: var(--muted); } svg .unused { opacity: .45; }
svg .chip { fill: var(--accent); } svg .wire { fill: none; stroke: var(--muted); stroke-width: 1.5; }
svg .arrow { fill: var(--muted); } svg .joint { fill: var(--muted); } svg .cell { fill: none; stroke: var(--line);
  stroke-dasharray: 5 4; }
svg .line-accent { fill: none; stroke: var(--accent); stroke-width: 2; } svg .dot-accent { fill: var(--accent); }
svg .line-second { fill: none; stroke: var(--second); stroke-width: 2; } svg .dot-second { fill: var(--second); }
svg .line-muted { fill: none; stroke: var(--muted); stroke-width: 2; stroke-dasharray: 5 3; }
svg .dot-muted { fill: var(--muted); } svg .coarse { fill: none; stroke: var(--muted); stroke-width: 1.6; }
svg .alone { stroke: var(--second); stroke-width: 2.5; } svg .range { stroke: var(--line); stroke-width: 2; }
@media (max-width: 560px) { .tools label { flex: 1 1 100%; flex-wrap: wrap; }
  .tools :is(input, select) { flex: 1 1 180px; } }
@media print { body { background: none; } .tools { display: none; } .tall { max-height: none; }
  .panel, details.cluster { break-inside: avoid; } nav { display: none; } }
""")
