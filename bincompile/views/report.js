"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const marks = new Map(data.marks.map((mark) => [mark.key, mark]));
const sheet = document.getElementById("sheet");
const find = document.getElementById("find");
const only = document.getElementById("only");
const panels = [...document.querySelectorAll(".panel")];
const sides = panels.map((panel) => panel.id);
let selected = null;

const nodeOf = (side, name) => document.getElementById(`${side}-${name}`);
const sideOf = (node) => node.closest(".panel").id;
const nameOf = (node) => node.id.slice(sideOf(node).length + 1);
const words = (text) => (text ? text.split(" ") : []);

function element(tag, text, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  if (text !== undefined) made.textContent = text;
  return made;
}

function unset(...classes) {
  for (const name of classes) {
    for (const found of [...document.getElementsByClassName(name)]) found.classList.remove(name);
  }
}

function reveal(node) {
  for (let at = node.parentElement.closest("details"); at;
    at = at.parentElement.closest("details")) {
    at.open = true;
  }
  const lines = node.closest(".lines");
  const offset = node.getBoundingClientRect().top - lines.getBoundingClientRect().top;
  lines.scrollTop += offset - lines.clientHeight / 3;
}

const users = new Map();
function usersOf(node) {
  const side = sideOf(node);
  if (!users.has(side)) {
    const found = new Map();
    for (const reader of document.querySelectorAll(`#${side} .node[data-reads]`)) {
      for (const name of words(reader.dataset.reads)) {
        found.set(name, [...(found.get(name) || []), reader]);
      }
    }
    users.set(side, found);
  }
  return users.get(side).get(nameOf(node)) || [];
}

const inputsOf = (node) => words(node.dataset.reads)
  .map((name) => nodeOf(sideOf(node), name)).filter(Boolean);

function nodesOf(mark) {
  return sides.flatMap((side) => mark[side].map((name) => nodeOf(side, name)).filter(Boolean));
}

function showNeighbours(node) {
  unset("input", "user");
  for (const input of inputsOf(node)) input.classList.add("input");
  for (const user of usersOf(node)) user.classList.add("user");
}

function entry(list, name, content) {
  const value = element("dd");
  value.append(...[content].flat());
  list.append(element("dt", name), value);
}

function nodeButtons(nodes) {
  return nodes.map((node) => element("button", nameOf(node), {
    type: "button", onclick: () => selectNode(node),
  }));
}

function openSheet(title, hue, entries) {
  const bar = element("div");
  bar.append(element("h2", title));
  if (marks.size) {
    bar.append(
      element("button", "Previous", { type: "button", onclick: () => step(-1) }),
      element("button", "Next", { type: "button", onclick: () => step(1) }),
    );
  }
  bar.append(
    element("button", "Tables", { type: "button", onclick: () => scrollTo({ top: 0 }) }),
    element("button", "Close", { type: "button", onclick: clear }),
  );
  const list = element("dl");
  for (const [name, content] of entries) entry(list, name, content);
  sheet.replaceChildren(bar, list);
  sheet.classList.toggle("coloured", typeof hue === "number");
  sheet.classList.toggle("refused", hue === null);
  sheet.style.setProperty("--hue", hue);
  sheet.hidden = false;
  sheet.scrollTop = 0;
}

function selectMark(key, go = true) {
  const mark = marks.get(key);
  if (!mark) return;
  unset("selected", "current", "input", "user");
  selected = key;
  const chosen = [...document.querySelectorAll(`[data-mark="${key}"]`)];
  for (const one of [...chosen, ...nodesOf(mark)]) one.classList.add("selected");
  const entries = mark.facts.filter(([, text]) => text)
    .map(([name, text]) => [name, name === "source" ? element("code", text) : text]);
  for (const side of sides) {
    const nodes = mark[side].map((name) => nodeOf(side, name)).filter(Boolean);
    if (nodes.length) entries.push([`nodes ${side}`, nodeButtons(nodes)]);
  }
  openSheet(mark.label, mark.hue, entries);
  for (const side of sides) {
    const first = mark[side].map((name) => nodeOf(side, name)).find(Boolean);
    if (first) reveal(first);
  }
  if (go) document.getElementById("graphs").scrollIntoView();
  history.replaceState(null, "", `#${key}`);
}

function selectNode(node) {
  unset("selected", "current");
  node.classList.add("current");
  showNeighbours(node);
  const own = words(node.dataset.marks).map((key) => marks.get(key));
  const [call, value] = [node.querySelector("span"), node.querySelector("i")];
  const entries = [["call", element("code", call.textContent)],
    ["value", element("code", value.textContent)]];
  const section = node.closest(".module");
  const path = node.querySelector(".path") || (section && section.querySelector("summary"));
  if (path) {
    const text = path.classList.contains("path") ? path.textContent
      : [...path.childNodes].slice(0, 2).map((part) => part.textContent).join("");
    entries.push(["module", element("code", text)]);
  }
  if (node.dataset.line) entries.push(["source", element("code", data.sources[node.dataset.line])]);
  if (inputsOf(node).length) entries.push(["reads", nodeButtons(inputsOf(node))]);
  if (usersOf(node).length) entries.push(["read by", nodeButtons(usersOf(node))]);
  if (own.length) {
    entries.push(["belongs to", own.map((mark) => element("button", mark.label, {
      type: "button", onclick: () => selectMark(mark.key),
    }))]);
    selected = own[0].key;
  }
  openSheet(nameOf(node), own.length ? own[0].hue : undefined, entries);
  reveal(node);
  history.replaceState(null, "", `#${node.id}`);
}

function step(by) {
  const keys = [...marks.keys()];
  if (!keys.length) return;
  const at = keys.indexOf(selected);
  const next = at < 0 ? (by > 0 ? 0 : keys.length - 1) : at + by;
  selectMark(keys[(next + keys.length) % keys.length]);
}

function clear() {
  unset("selected", "current", "input", "user", "lit");
  sheet.hidden = true;
  selected = null;
  history.replaceState(null, "", location.pathname);
}

const texts = new Map();
let openBefore = null; // which sections were open before the search opened others
function filter() {
  const wanted = words(find.value.trim().toLowerCase());
  const active = wanted.length > 0 || only.checked;
  const modules = [...document.querySelectorAll(".module")];
  if (active && !openBefore) openBefore = new Map(modules.map((m) => [m, m.open]));
  if (!active && openBefore) {
    for (const [module, open] of openBefore) module.open = open;
    openBefore = null;
  }
  unset("hit");
  const counts = panels.map((panel) => {
    panel.classList.toggle("filtering", active);
    if (!active) return 0;
    let count = 0;
    for (const node of panel.querySelectorAll(".node")) {
      if (!texts.has(node)) texts.set(node, fullText(node));
      if (only.checked && !node.dataset.marks) continue;
      if (!wanted.every((word) => texts.get(node).includes(word))) continue;
      count += 1;
      node.classList.add("hit");
      for (let at = node.closest(".module"); at && !at.classList.contains("hit");
        at = at.parentElement.closest(".module")) {
        at.classList.add("hit");
        at.open = true;
      }
    }
    return count;
  });
  document.getElementById("count").textContent = active
    ? sides.map((side, index) => `${counts[index]} ${side}`).join(", ") : "";
}

function fullText(node) {
  const section = node.closest(".module");
  const path = section ? section.querySelector("summary").textContent : "";
  return `${node.textContent} ${path}`.toLowerCase();
}

function setOpen(open) {
  for (const module of document.querySelectorAll(".module")) module.open = open;
}

function light(target, on) {
  const node = target.closest(".node");
  const holder = target.closest("[data-mark]");
  const keys = node ? words(node.dataset.marks) : holder ? [holder.dataset.mark] : [];
  unset("lit");
  if (!document.querySelector(".current")) unset("input", "user");
  if (!on) return;
  for (const key of keys) for (const one of nodesOf(marks.get(key))) one.classList.add("lit");
  if (node && !document.querySelector(".current")) showNeighbours(node);
}

function move(lines, by) {
  const visible = [...lines.querySelectorAll(".node")].filter((n) => n.getClientRects().length);
  const at = visible.indexOf(lines.querySelector(".current"));
  const next = visible[Math.min(visible.length - 1, Math.max(0, at + by))];
  if (next) selectNode(next);
}

function follow() {
  const hash = decodeURIComponent(location.hash.slice(1));
  const target = document.getElementById(hash);
  if (hash.startsWith("find=")) {
    find.value = hash.slice(5);
    filter();
  } else if (marks.has(hash)) selectMark(hash);
  else if (target && target.dataset.mark) selectMark(target.dataset.mark);
  else if (target && target.classList.contains("node")) {
    document.getElementById("graphs").scrollIntoView();
    selectNode(target);
  }
}

document.addEventListener("click", (event) => {
  const node = event.target.closest(".node");
  const holder = event.target.closest("[data-mark]");
  if (node) selectNode(node);
  else if (holder) selectMark(holder.dataset.mark);
});
document.addEventListener("mouseover", (event) => light(event.target, true));
document.addEventListener("mouseleave", (event) => light(document.body, false));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    find.value = "";
    only.checked = false;
    filter();
    clear();
    return;
  }
  if (event.target.tagName === "INPUT") return;
  const lines = document.activeElement.closest(".lines");
  const arrows = { ArrowDown: 1, ArrowUp: -1 };
  if (lines && event.target === lines && event.key in arrows) {
    event.preventDefault();
    move(lines, arrows[event.key]);
  } else if (event.key === "/") {
    event.preventDefault();
    find.focus();
  } else if (event.key === "n") step(1);
  else if (event.key === "p") step(-1);
});
find.addEventListener("input", filter);
only.addEventListener("change", filter);
document.getElementById("open").addEventListener("click", () => setOpen(true));
document.getElementById("close").addEventListener("click", () => setOpen(false));
window.addEventListener("hashchange", follow);
follow();
