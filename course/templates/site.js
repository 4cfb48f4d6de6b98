// Search in all pages of the course: SECTIONS, from search.js, has the text of each section.
"use strict";
const input = document.querySelector(".search input"), list = document.querySelector(".search ol");
const menu = document.querySelector(".menu");
const wordsOf = text => text.toLowerCase().split(/\s+/).filter(Boolean);
const count = (text, word) => text.toLowerCase().split(word).length - 1;

function value(section, words) {  // 0 if a word is missing
  const values = words.map(word => 8 * count(section.title, word) + 8 * count(section.heading, word)
    + Math.min(3, count(section.text, word)));
  const phrase = count(section.text, words.join(" ")) ? 5 : 0;
  return values.every(Boolean) ? values.reduce((a, b) => a + b) + phrase : 0;
}
function found(words) {  // the best sections, of equal ones the first
  return SECTIONS.map(section => [value(section, words), section]).filter(([value]) => value)
    .sort(([a], [b]) => b - a).slice(0, 12).map(([, section]) => section);
}
function addMarked(parent, text, words) {  // text with each of the words in a <mark>
  const escaped = words.map(word => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  for (const part of text.split(new RegExp(`(${escaped.join("|")})`, "i")))
    parent.append(words.includes(part.toLowerCase())
      ? Object.assign(document.createElement("mark"), {textContent: part}) : part);
}
function excerpt(text, words) {
  const at = text.toLowerCase().indexOf(words[0]), start = Math.max(0, at - 60);
  const part = text.slice(start, start + 140);
  return (start ? part.replace(/^\S*/, "…") : part) + (start + 140 < text.length ? " …" : "");
}
function search() {
  const words = wordsOf(input.value);
  list.replaceChildren();
  list.hidden = !words.length;
  if (!words.length) return;
  for (const section of found(words)) {
    const link = document.createElement("a"), note = document.createElement("small");
    link.href = `${document.body.dataset.up}${section.page}?find=`
      + `${encodeURIComponent(words.join(" "))}#${section.anchor}`;
    const isTitle = section.heading === section.title;
    addMarked(link, isTitle ? section.title : `${section.title}: ${section.heading}`, words);
    addMarked(note, excerpt(section.text, words), words);
    link.append(note);
    list.appendChild(document.createElement("li")).append(link);
  }
  if (!list.children.length) list.append("Nothing was found.");
}
function isIn(section, node) {  // between a heading and the next one
  const headings = [...document.querySelectorAll("article :is(h1, h2, h3, h4)")];
  const next = headings[headings.indexOf(section) + 1], {DOCUMENT_POSITION_FOLLOWING} = Node;
  return section.compareDocumentPosition(node) & DOCUMENT_POSITION_FOLLOWING
    && !(next?.compareDocumentPosition(node) & DOCUMENT_POSITION_FOLLOWING);
}
function markFound(section, words) {  // folded parts that have one of the words are opened
  const texts = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (texts.nextNode())
    if (isIn(section, texts.currentNode)
        && words.some(word => count(texts.currentNode.textContent, word)))
      nodes.push(texts.currentNode);
  for (const node of nodes) {
    const folded = node.parentElement.closest("details");
    if (folded) folded.open = true;
    const parts = document.createElement("span");
    addMarked(parts, node.textContent, words);
    node.replaceWith(...parts.childNodes);
  }
  section.scrollIntoView();
}

input.addEventListener("input", search);
input.addEventListener("focus", search);
input.addEventListener("keydown", event => {
  if (event.key === "Enter") list.querySelector("a")?.click();
  if (event.key === "ArrowDown") list.querySelector("a")?.focus();
});
list.addEventListener("keydown", event => {
  const next = {ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling"}[event.key];
  if (!next) return;
  event.preventDefault();
  (document.activeElement.parentElement[next]?.querySelector("a") ?? input).focus();
});
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== input) {
    event.preventDefault();
    input.focus();
  } else if (event.key === "Escape") {
    input.value = "";
    search();
  }
});
document.addEventListener("click", event => {
  if (event.target !== input) list.hidden = true;
});
if (matchMedia("(max-width: 860px)").matches) menu.open = false;
const asked = new URLSearchParams(location.search).get("find");
const section = document.getElementById(decodeURIComponent(location.hash.slice(1)));
if (asked && section) markFound(section, wordsOf(asked));
