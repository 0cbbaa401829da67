// Keeps an open view up to date: it is read again now and then, and what differs takes the place of what was there.
// Without this script every view works and stands still.
"use strict";

const every = Number(document.body.dataset.refresh);
const lost = document.getElementById("lost");
const live = document.getElementById("live");
let paused = false;
let failures = 0;

/** What has the focus, so that it can be found again in what takes its place. */
function findable(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  const address = element.getAttribute("href");
  return address ? `a[href="${CSS.escape(address)}"]` : null;
}

function isSelectedIn(section) {
  const selection = document.getSelection();
  return Boolean(selection && !selection.isCollapsed && selection.anchorNode && section.contains(selection.anchorNode));
}

function takeOver(fresh) {
  const found = new Map([...fresh.querySelectorAll("[data-live]")].map((section) => [section.id, section]));
  const here = [...document.querySelectorAll("[data-live]")];
  // Sections come and go, such as a run that begins: then the whole of main is another one.
  const differs = here.length !== found.size || here.some((section) => !found.has(section.id));
  const pairs = differs
    ? [[document.getElementById("main"), fresh.getElementById("main")]]
    : here.map((section) => [section, found.get(section.id)]);
  for (const [old, next] of pairs) {
    if (!old || !next || old.innerHTML === next.innerHTML || isSelectedIn(old)) continue;
    const focused = old !== document.activeElement && old.contains(document.activeElement);
    const where = focused ? findable(document.activeElement) : null;
    old.replaceChildren(...document.adoptNode(next).childNodes);
    const again = where && old.querySelector(where);
    if (again) again.focus({ preventScroll: true });
  }
  document.title = fresh.title;
}

async function refresh() {
  if (paused || document.hidden) return;
  try {
    const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" }, redirect: "manual" });
    if (answer.type === "opaqueredirect") {
      location.assign("/enter");
      return;
    }
    if (!answer.ok) throw new Error(String(answer.status));
    takeOver(new DOMParser().parseFromString(await answer.text(), "text/html"));
    if (failures) lost.textContent = "";
    failures = 0;
  } catch {
    failures += 1;
    // Once is a moment of the network.
    if (failures === 2) lost.textContent = "The page’s server does not answer; what you see is of before. It is asked again.";
  }
}

async function go() {
  const began = performance.now();
  await refresh();
  // Large books take their time: whoever watches them leaves most of it to those who write them.
  const took = performance.now() - began;
  setTimeout(go, Math.max(every * Math.min(8, 1 + failures), 4 * took));
}

// A form that somebody fills in is left alone.
if (document.querySelector("[data-live]") && !document.querySelector("form.ask")) {
  live.hidden = false;
  live.addEventListener("click", () => {
    paused = !paused;
    live.setAttribute("aria-pressed", String(!paused));
    live.textContent = paused ? "Paused" : "Live";
    document.body.classList.toggle("paused", paused);
    refresh();
  });
  document.addEventListener("visibilitychange", refresh);
  setTimeout(go, every);
}
