"use strict";
// Keys, and answers sent without a new page. Without this script the forms do the same work, one page after the other.

const RETRY_MILLISECONDS = 2000;
const live = document.getElementById("live");
const warning = document.getElementById("alert");
const help = document.getElementById("help");
let sending = false;
let watching = null;
document.documentElement.classList.add("script");

function part(selector) {
  return document.getElementById("page").querySelector(selector);
}

// Answers are disabled until the beginning and the end of both responses have been in view, above the answers.
function watch() {
  watching?.disconnect();
  const bar = part(".bar");
  const unread = new Set([...part("main").querySelectorAll("[data-read]")].filter((mark) => !mark.dataset.seen));
  if (!bar) return;
  allow(bar, unread);
  const covered = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
  watching = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      target.dataset.seen = "yes";
      unread.delete(target);
    }
    allow(bar, unread);
  }, { rootMargin: `0px 0px -${covered}px 0px` });
  for (const mark of unread) watching.observe(mark);
}

function allow(bar, unread) {
  const letters = [...new Set([...unread].map((mark) => mark.dataset.read))].sort();
  const hint = bar.querySelector("#unread");
  hint.hidden = letters.length === 0;
  hint.textContent = letters.length ? `Read response ${letters.join(" and ")} to the end, then answer.` : "";
  for (const button of bar.querySelectorAll(".choice")) button.disabled = letters.length > 0;
}

// The same form, with the same token, until the server has answered: it counts once however often it arrives.
async function deliver(form, body) {
  for (;;) {
    try {
      const response = await fetch(form.action, { method: "POST", body });
      if (response.status < 500) {
        const text = await response.text();
        warning.hidden = true;
        return { address: response.url, text };
      }
      const unsaved = unsavedText(await response.text());
      if (unsaved) {
        warning.textContent = unsaved;
        warning.hidden = false;
        return null;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    warning.textContent = "Not saved yet: the server does not answer. Your answer is kept here and sent again; leave this page open.";
    warning.hidden = false;
    await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
  }
}

// The server's own words where it could not save: then it is for the labeller to try again, or to choose otherwise.
function unsavedText(text) {
  const page = new DOMParser().parseFromString(text, "text/html");
  return page.querySelector("[data-unsaved]")?.dataset.unsaved;
}

function show({ address, text }) {
  const next = new DOMParser().parseFromString(text, "text/html");
  const page = next.getElementById("page");
  if (!page || new URL(address).pathname === "/sign-in") return location.assign(address);
  document.getElementById("page").replaceWith(document.adoptNode(page));
  showGuidelines();
  watch();
  document.title = next.title;
  const main = part("main");
  live.textContent = main.dataset.announce || "";
  window.scrollTo(0, 0);
  main.focus({ preventScroll: true });
}

async function send(form, button) {
  if (sending) return;
  sending = true;
  const body = new URLSearchParams(new FormData(form, button));
  form.setAttribute("aria-busy", "true");
  for (const other of form.querySelectorAll(".sent")) other.classList.remove("sent");
  button.classList.add("sent");
  try {
    const reply = await deliver(form, body);
    if (reply) show(reply);
  } finally {
    form.removeAttribute("aria-busy");
    sending = false;
  }
}

// Guidelines that were closed stay closed, until there are others.
function showGuidelines() {
  const details = part("[data-guidelines]");
  if (!details) return;
  details.open = sessionStorage.getItem("closed guidelines") !== details.dataset.guidelines;
  details.addEventListener("toggle", () => sessionStorage.setItem("closed guidelines", details.open ? "" : details.dataset.guidelines));
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-quick]") || !event.submitter) return;
  event.preventDefault();
  if (event.submitter.name === "answer" && !event.submitter.value) return;
  send(event.target, event.submitter);
});

function showHelp() {
  help.showModal();
  help.scrollTop = 0;
}

document.addEventListener("click", (event) => {
  if (!event.target.closest("[data-help]") || !help.showModal) return;
  event.preventDefault();
  showHelp();
});

// Rating: `a` or `b` goes to the response's scale, a digit chooses there and goes back to the answers.
function rate(scale, key) {
  const input = scale.querySelector(`input[value="${key}"]`);
  if (!input) return;
  input.checked = true;
  live.textContent = `${scale.dataset.rating.toUpperCase()}: ${input.getAttribute("aria-label")}`;
  part("main").focus({ preventScroll: true });
}

function comment() {
  const details = part(".comment");
  if (!details) return;
  details.open = true;
  details.querySelector("textarea").focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || help.open) return;
  const at = document.activeElement;
  if (event.key === "Escape") return part("main")?.focus({ preventScroll: true });
  if (at.matches("textarea, input:not([type=radio])")) return;
  const key = event.key.toLowerCase();
  const scale = at.closest("[data-rating]");
  const target = part(`[data-key="${CSS.escape(key)}"]`);
  const rating = part(`[data-rating="${CSS.escape(key)}"]`);
  if (scale && /^[1-9]$/.test(key)) rate(scale, key);
  else if (key === "?") showHelp();
  else if (rating) rating.querySelector("input:checked").focus();
  else if (key === "c" && part(".comment")) comment();
  else if (target?.disabled) live.textContent = part("#unread").textContent;
  else if (target) target.click();
  else return;
  event.preventDefault();
});

showGuidelines();
watch();
window.addEventListener("resize", watch);
