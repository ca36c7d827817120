// The page, in five files that page.py joins to one script.  Texts of models enter it as text nodes alone.  Only a
// live page asks anything, and only of the server that it came from.
"use strict";

const $ = (id) => document.getElementById(id);
const DATA = JSON.parse($("data").textContent);
const WRITERS = { sft: "SFT", ppo: DATA.facts?.policy ?? "PPO" };

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const signed = (x, digits = 2) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits);
const plain = (x, digits = 2) => (x < 0 ? "\u2212" : "") + Math.abs(x).toFixed(digits);
const known = (x) => typeof x === "number";
