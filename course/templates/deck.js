"use strict";
const $ = id => document.getElementById(id);
const slides = [...document.querySelectorAll("section")];
const STEPS = {ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -Infinity,
               End: Infinity};
let at = 0;  // in the chapter that was chosen

function inChapter() {
  const chapter = $("chapter").value;
  return slides.filter(slide => !chapter || slide.dataset.chapters.split(" ").includes(chapter));
}
function show(number) {
  const shown = inChapter(), chapter = $("chapter").value;
  at = Math.max(0, Math.min(shown.length - 1, number));
  for (const slide of slides) {
    slide.hidden = slide !== shown[at];
    slide.classList.toggle("left-out", !shown.includes(slide));  // of a print
  }
  scrollTo(0, 0);
  $("number").textContent = `${at + 1} / ${shown.length}`;
  history.replaceState(null, "", `#${chapter}${chapter && "/"}${at + 1}`);
}
function read() {  // the address: #7, #talk, or #talk/7
  const parts = location.hash.slice(1).split("/");
  const isChapter = [...$("chapter").options].some(option => option.value === parts[0]);
  $("chapter").value = isChapter ? parts.shift() : "";
  show((parseInt(parts[0]) || 1) - 1);
}

addEventListener("keydown", event => {
  const isOther = event.ctrlKey || event.altKey || event.metaKey || event.target === $("chapter")
    || event.key === " " && event.target !== document.body;
  if (!(event.key in STEPS) || isOther) return;
  event.preventDefault();
  show(at + STEPS[event.key]);
});
let start;  // of a swipe, null if it is none
addEventListener("touchstart", event => {
  const isSwipe = event.touches.length === 1 && !event.target.closest(".table");
  start = isSwipe ? event.touches[0] : null;
}, {passive: true});
addEventListener("touchend", event => {
  const {clientX, clientY} = event.changedTouches[0];
  const dx = start ? clientX - start.clientX : 0, dy = start ? clientY - start.clientY : 0;
  if (Math.abs(dx) > 50 && Math.abs(dx) > 2 * Math.abs(dy)) show(at - Math.sign(dx));
});
$("back").onclick = () => show(at - 1);
$("next").onclick = () => show(at + 1);
$("chapter").onchange = () => { show(0); $("chapter").blur(); };
addEventListener("hashchange", read);
read();
