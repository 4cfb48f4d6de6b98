"use strict";
const $ = id => document.getElementById(id);
const slides = [...document.querySelectorAll("section")];
const inChapter = () => slides.filter(slide =>
  !$("chapter").value || slide.dataset.chapters.split(" ").includes($("chapter").value));
let at = 0;  // in the chapter

function show(number) {
  const shown = inChapter(), chapter = $("chapter").value;
  at = Math.max(0, Math.min(shown.length - 1, number));
  for (const slide of slides) {
    slide.hidden = slide !== shown[at];
    slide.classList.toggle("left-out", !shown.includes(slide));
  }
  scrollTo(0, 0);
  $("number").textContent = `${at + 1} / ${shown.length}`;
  history.replaceState(null, "", `#${chapter}${chapter && "/"}${at + 1}`);
}
function read() {  // the address: #7, #talk, or #talk/7
  const parts = location.hash.slice(1).split("/"), names = [...$("chapter").options];
  $("chapter").value = names.some(name => name.value === parts[0]) ? parts.shift() : "";
  show((parseInt(parts[0]) || 1) - 1);
}
function turn(event, steps) {
  event.preventDefault();
  show(at + steps);
}

const STEPS = {ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -Infinity, End: Infinity};
addEventListener("keydown", event => {
  const isOther = event.ctrlKey || event.altKey || event.metaKey || event.target === $("chapter")
    || event.key === " " && event.target !== document.body;
  if (event.key in STEPS && !isOther) turn(event, STEPS[event.key]);
});
let start;  // of a touch
addEventListener("touchstart", event => start = event.touches[0], {passive: true});
addEventListener("touchend", event => {
  const {clientX, clientY} = event.changedTouches[0], dx = clientX - start.clientX;
  if (Math.abs(dx) > 50 && Math.abs(dx) > 2 * Math.abs(clientY - start.clientY)) show(at - Math.sign(dx));
});
$("back").onclick = event => turn(event, -1);
$("next").onclick = event => turn(event, 1);
$("chapter").onchange = () => { show(0); $("chapter").blur(); };
addEventListener("hashchange", read);
read();
