"""The frame of the page of ``kvtier generate --explain``: ``string.Template`` text with style and script inside."""

from typing import Final

__all__ = ["PAGE"]

PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>kvtier: what $policy kept and read</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --line: #d0d7de; --mark: 191 135 0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #3d444d; --mark: 210 153 34; }
}
body { $shades }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1, h2 { line-height: 1.2; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
.strip { min-width: 12rem; height: 1.4rem; border: 1px solid var(--line); forced-color-adjust: none; }
details ol { margin: .3rem 0; padding-left: 2rem; }
details .strip { height: .8rem; margin: .2rem 0; }
#text { padding: 1rem; border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.6 ui-monospace, monospace; color: var(--soft); }
mark { color: var(--ink); background: none; border-bottom: 1px solid rgb(var(--mark)); }
mark.l1 { background: rgb(var(--mark) / .1); }
mark.l2 { background: rgb(var(--mark) / .2); border-bottom-width: 2px; }
mark.l3 { background: rgb(var(--mark) / .3); border-bottom-width: 3px; }
mark.l4 { background: rgb(var(--mark) / .4); border-bottom-width: 3px; border-bottom-style: double; }
mark:focus, button:focus-visible, select:focus-visible { outline: 3px solid; outline-offset: 2px; }
.bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .5rem 0; background: var(--paper); }
.script { display: none; }
button, select { font: inherit; }
</style>
</head>
<body>
<main>
<h1>What <code>$policy</code> kept and read</h1>
<p>A prompt of $tokens tokens. The answer: <q>$answer</q></p>
<h2 id="about">The document</h2>
<div class="bar script">
<label>Show <select id="view">$options</select></label>
<button type="button" id="back">Previous mark</button>
<button type="button" id="next">Next mark</button>
</div>
<p id="summary" role="status">$summary</p>
<p>Marked is what was run, kept or read:
<mark class="l1">up to a quarter</mark>, <mark class="l2">a half</mark>, <mark class="l3">three quarters</mark>,
<mark class="l4">more</mark> of KV heads or decode steps. What is not marked was not.</p>
<div id="text" role="region" aria-labelledby="about" tabindex="0">$document</div>
<h2>Layer by layer</h2>
<table>
<thead><tr><th scope="col">view</th><th scope="col">in numbers</th>
<th scope="col">beginning to end of the prompt</th></tr></thead>
<tbody>$rows</tbody>
</table>
<details><summary>The marked passages of the first view, as a list</summary><ol>$passages</ol></details>
</main>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("text");
const choice = document.getElementById("view");
let at = -1;
function show(view) {
  const pieces = [];
  let start = 0;
  for (let i = 0; i < view.runs.length; i += 2) {
    const text = data.text.slice(start, start + view.runs[i]);
    start += view.runs[i];
    if (view.runs[i + 1]) {
      const mark = document.createElement("mark");
      mark.className = "l" + view.runs[i + 1];
      mark.textContent = text;
      pieces.push(mark);
    } else {
      pieces.push(document.createTextNode(text));
    }
  }
  page.replaceChildren(...pieces);
  document.getElementById("summary").textContent = view.title + ": " + view.summary;
  at = -1;
}
function move(by) {
  const marks = page.getElementsByTagName("mark");
  if (!marks.length) return;
  at = at < 0 && by < 0 ? marks.length - 1 : (at + by + marks.length) % marks.length;
  marks[at].tabIndex = -1;
  marks[at].focus();
}
choice.addEventListener("change", () => show(data.views[choice.value]));
document.getElementById("next").addEventListener("click", () => move(1));
document.getElementById("back").addEventListener("click", () => move(-1));
for (const bar of document.getElementsByClassName("script")) bar.classList.remove("script");
</script>
</body>
</html>
"""
