"use strict";
// Keys, and answers sent without a new page. Without this script the forms do the same work, one page after the other.

const RETRY_MILLISECONDS = 2000;
const live = document.getElementById("live");
const warning = document.getElementById("alert");
const help = document.getElementById("help");
let sending = false;

function part(selector) {
  return document.getElementById("page").querySelector(selector);
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
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
    }
    warning.textContent = "Not saved yet: the server does not answer. Your answer is kept here and sent again; leave this page open.";
    warning.hidden = false;
    await new Promise((resolve) => setTimeout(resolve, RETRY_MILLISECONDS));
  }
}

function show({ address, text }) {
  const next = new DOMParser().parseFromString(text, "text/html");
  const page = next.getElementById("page");
  if (!page || new URL(address).pathname === "/sign-in") return location.assign(address);
  document.getElementById("page").replaceWith(document.adoptNode(page));
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
  button.classList.add("sent");
  try {
    show(await deliver(form, body));
  } finally {
    sending = false;
  }
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
  else if (target) target.click();
  else return;
  event.preventDefault();
});
