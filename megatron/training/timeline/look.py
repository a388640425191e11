"""How the page of a timeline looks, in light and dark, and how it answers to the keyboard."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6; --track: #f3f5f8;
  --card: #f6f8fb; --F: #2f6fb5; --F2: #6a9fd8; --onF: #ffffff; --B: #f0a53c; --B2: #f7c77f; --onB: #2b1d05;
  --I: #e8743b; --I2: #f2a27b; --onI: #2b0f02; --W: #3f9a6a; --W2: #7fc09c; --onW: #04220f;
  --p2p: #8a94a3; --p2pground: #e4e8ee; --collective: #8e5bb5; --optimizer: #c0497b; --data: #8a6d4f;
  --other: #9aa4b2; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --ink: #e8ecf2; --soft: #9aa6b5; --line: #2c3440;
  --track: #1a2029; --card: #1a2029; --F: #5b9be0; --F2: #35659c; --onF: #06121f; --B: #e9a548; --B2: #9a6a24;
  --onB: #1d1303; --I: #ea8452; --I2: #9c5230; --onI: #1f0b02; --W: #5fbf8a; --W2: #35724f; --onW: #04190c;
  --p2p: #7b8798; --p2pground: #2a323d; --collective: #b98be0; --optimizer: #e0719f; --data: #b79670;
  --other: #6b7685; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 32px 48px; max-width: 1500px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 26px; margin: 0; font-weight: 650; } h2 { font-size: 18px; margin: 32px 0 10px; font-weight: 650; }
.layout { margin: 2px 0 18px; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 18px; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px;
  min-width: 128px; }
.cards dt { font-size: 12.5px; color: var(--soft); } .cards dd { margin: 0; font-size: 20px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; list-style: none; margin: 0 0 6px; padding: 0;
  font-size: 13.5px;
  color: var(--soft); } .legend li { display: flex; align-items: center; gap: 7px; }
.chart { display: flex; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.labels { flex: none; } .boxes { overflow-x: auto; flex: 1; } svg { display: block; }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--ink); }
.label { fill: var(--soft); font-size: 12.5px; } .heading { font-size: 14px; font-weight: 650; }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; } .grid { stroke: var(--line); }
.track { fill: var(--track); }
.F { fill: var(--F); } .B { fill: var(--B); } .I { fill: var(--I); } .W { fill: var(--W); }
.F.odd { fill: var(--F2); } .B.odd { fill: var(--B2); } .I.odd { fill: var(--I2); } .W.odd { fill: var(--W2); }
.p2p { fill: url(#wait); } .strip.p2p { fill: var(--p2p); }
.wait-ground { fill: var(--p2pground); } .wait-line { fill: var(--p2p); }
.collective { fill: var(--collective); } .optimizer { fill: var(--optimizer); } .data { fill: var(--data); }
.other { fill: var(--other); }
.s { stroke: var(--ground); stroke-width: 0.8; } .strip { stroke-width: 0.4; }
.s:hover, .s:focus { stroke: var(--ink); stroke-width: 2; outline: none; }
[class^="on-"] { font-size: 11px; text-anchor: middle; pointer-events: none; font-variant-numeric: tabular-nums; }
.on-F { fill: var(--onF); } .on-B { fill: var(--onB); } .on-I { fill: var(--onI); } .on-W { fill: var(--onW); }
#what { min-height: 1.6em; margin: 10px 0 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; } tbody th { text-align: left; font-weight: 600; }
td.place, th:nth-child(2) { text-align: left; color: var(--soft); }
.note { color: var(--soft); font-size: 13.5px; max-width: 76ch; } details { margin-top: 26px; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 10px; }
:focus-visible { outline: 2px solid var(--F); outline-offset: 2px; }
@media print { body { max-width: none; padding: 0; } .boxes { overflow: visible; } }
"""

SCRIPT = """
const what = document.getElementById("what");
const rows = [...document.querySelectorAll(".boxes g[role=list]")].map(g => [...g.querySelectorAll("rect[tabindex]")]);
const show = box => { const title = box.querySelector("title"); if (title) what.textContent = title.textContent; };
document.querySelector(".boxes").addEventListener("pointerover", e => e.target.matches(".s") && show(e.target));
document.querySelector(".boxes").addEventListener("focusin", e => e.target.matches(".s") && show(e.target));
document.querySelector(".boxes").addEventListener("keydown", e => {
  const row = rows.findIndex(boxes => boxes.includes(e.target));
  if (row < 0) return;
  const column = rows[row].indexOf(e.target), x = e.target.x.baseVal.value;
  let next;
  if (e.key === "ArrowRight") next = rows[row][column + 1];
  else if (e.key === "ArrowLeft") next = rows[row][column - 1];
  else if (e.key === "Home") next = rows[row][0];
  else if (e.key === "End") next = rows[row].at(-1);
  else if (e.key === "ArrowDown" || e.key === "ArrowUp") {
    const other = rows[row + (e.key === "ArrowDown" ? 1 : -1)] || [];
    const away = box => Math.abs(box.x.baseVal.value - x);
    next = other.reduce((a, b) => !a || away(b) < away(a) ? b : a, null);
  } else return;
  e.preventDefault();
  if (next) { next.focus(); next.scrollIntoView({block: "nearest", inline: "nearest"}); }
});
"""
